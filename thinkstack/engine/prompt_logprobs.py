"""Log-probabilities of given tokens: of a continuation, and of a prompt while the engine computes it.

They are those of the model at temperature 1. A prompt is scored where it is prefilled, in the chunks of the scheduler,
so that a long one delays nobody for longer than its prefill does; its blocks are not taken from the prefix cache,
because the cache has no hidden states.
"""

# Shapes in this file: N tokens, D hidden size, V vocabulary size, K alternatives.

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch
from torch import Tensor

if TYPE_CHECKING:
    from thinkstack.engine.scheduler import SchedulerOutput
    from thinkstack.engine.sequence_table import SequenceTable

HEAD_ROWS = 512
"""Tokens whose logits are computed at once, which limits their memory."""
Head = Callable[[Tensor], Tensor]
"""Logits (N, V) of hidden states (N, D)."""


class TokenLogprobs(NamedTuple):
    """How likely tokens are, and what is most likely in their place."""

    logprobs: Tensor
    """(N,) fp32."""
    top_token_ids: Tensor
    """(N, K) int64, best first."""
    top_logprobs: Tensor
    """(N, K) fp32; equal to `logprobs` to the bit where a token is among the best."""


def token_logprobs(head: Head, hidden: Tensor, targets: Tensor, num_top: int = 0) -> TokenLogprobs:
    """Log-probabilities of targets (N,) after hidden states (N, D), in slices of HEAD_ROWS. num_top: K."""
    parts = []
    for start in range(0, len(targets), HEAD_ROWS):
        part = targets[start : start + HEAD_ROWS]
        values = head(hidden[start : start + HEAD_ROWS]).float().log_softmax(-1)  # (N, V)
        best = values.topk(min(num_top, values.shape[-1]), dim=-1)
        parts.append((values.gather(-1, part[:, None]).squeeze(-1), best.indices, best.values))
    return TokenLogprobs(*map(torch.cat, zip(*parts, strict=True)))


class PromptLogprobs:
    """Log-probabilities of the tokens of a prompt, of which the first has none."""

    def __init__(self, num_tokens: int, num_top: int):
        self.num_top = num_top
        self.logprobs = numpy.full(num_tokens, numpy.nan, dtype=numpy.float32)
        """(N,), NaN for the first token."""
        self.top_token_ids = numpy.zeros((num_tokens, num_top), dtype=numpy.int64)
        """(N, K), best first; 0 for the first token."""
        self.top_logprobs = numpy.full((num_tokens, num_top), numpy.nan, dtype=numpy.float32)
        """(N, K), NaN for the first token."""
        self.is_complete = num_tokens < 2

    def pairs(self, place: int) -> tuple[tuple[int, float], ...]:
        """(id, log-probability) of the most likely tokens at a place, best first."""
        return tuple(zip(self.top_token_ids[place].tolist(), self.top_logprobs[place].tolist(), strict=True))


def score_prompts(table: "SequenceTable", scheduled: "SchedulerOutput", hidden: Tensor, head: Head) -> None:
    """Score the prompt tokens that follow the tokens of a step, for the rows that ask for it.

    hidden: states (N, D) of the scheduled tokens. A row that is preempted in its prompt begins again.
    """
    ends = scheduled.counts.cumsum()
    for place in table.scores_prompt[scheduled.rows].nonzero()[0].tolist():
        row, start = int(scheduled.rows[place]), int(scheduled.starts[place])
        found, last = table.request_at(row)[0].prompt_logprobs, int(table.num_prompt_tokens[row]) - 1
        assert found is not None, "the row asks for log-probabilities"
        count = min(int(scheduled.counts[place]), last - start)
        if count > 0:
            first = int(ends[place] - scheduled.counts[place])
            targets = torch.from_numpy(table.ids[row, start + 1 : start + 1 + count]).to(hidden.device)
            scored = token_logprobs(head, hidden[first : first + count], targets, found.num_top)
            own = slice(start + 1, start + 1 + count)
            found.logprobs[own] = scored.logprobs.cpu().numpy()
            found.top_token_ids[own] = scored.top_token_ids.cpu().numpy()
            found.top_logprobs[own] = scored.top_logprobs.cpu().numpy()
            found.is_complete = found.is_complete or start + count == last
        table.scores_prompt[row] = not found.is_complete
