"""What every engine offers, ours and a pool of servers, and what all of them refuse alike."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from thinkstack.models.transformer import Transformer
from thinkstack.types import Completion, RequestError, Sampling

WhileRunning = Literal["refuse", "drain", "abort", "keep"]
"""What happens to answers being drawn when the weights change: the change is refused; they are finished first, with the
old weights; they end as aborted; they go on with the new weights, their context computed again."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """How an engine is."""

    alive: bool
    """Whether a request would be answered."""
    running: int
    """Answers being drawn; of servers, requests under way."""
    waiting: int
    """Answers, or groups of them, that wait for room."""
    failed: int
    """Answers that ended in an error so far; of servers, requests that one of them did not answer."""
    last_error: str | None
    """What last went wrong."""
    version: int
    """Of the weights in use."""


class AnyEngine(Protocol):
    """`Engine` and `RemoteEngine`: recipes hold one or the other and do not ask which."""

    max_context: int
    """Tokens of prompt and answer together."""
    version: int
    """Of the weights in use; every completion carries that of its first token."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Answer all prompts: sampling.n completions for each. on_progress is told how many prompts just finished."""

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Draw one answer and yield its tokens as they come; leaving the loop early aborts it."""

    def load_weights(self, model: Transformer, version: int, running: WhileRunning = "refuse") -> None:
        """Draw with these weights from now on; every completion carries their version."""

    def health(self) -> Health:
        """How it is."""


def check_request(prompt_ids: Sequence[int], sampling: Sampling, max_context: int, vocab_size: int) -> None:
    """Raise RequestError for a request that no engine of this context and vocabulary can serve."""
    total = len(prompt_ids) + sampling.max_tokens
    if not prompt_ids:
        raise RequestError("the prompt is empty; it needs at least a BOS token")
    if total > max_context:
        raise RequestError(
            f"prompt is {len(prompt_ids):,} tokens; this model takes {max_context:,} including "
            f"max_tokens={sampling.max_tokens:,}; shorten the prompt or max_tokens by {total - max_context:,}"
        )
    for name in ("stop_ids", "close_ids", "logit_bias"):
        _check_tokens(name, getattr(sampling, name), vocab_size)
    _check_tokens("the prompt", prompt_ids, vocab_size)


def _check_tokens(name: str, tokens: Collection[int], vocab_size: int) -> None:
    if len(tokens) and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise RequestError(f"{name} names token {wrong}; this vocabulary has 0..{vocab_size - 1}")
