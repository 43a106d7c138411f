"""What every engine offers, ours and a pool of servers, and what all of them refuse alike."""

import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from thinkstack.models.transformer import Transformer
from thinkstack.types import Completion, RequestError, SamplingParams

OnFinish = Callable[[int, list[Completion]], None]
"""Told the place of a prompt among those asked, and its completions."""
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

    max_model_len: int
    """Tokens of prompt and answer together."""
    version: int
    """Of the weights in use; every completion carries that of its first token."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[SamplingParams],
        on_finish: OnFinish | None = None,
    ) -> list[list[Completion]]:
        """Answer all prompts: sampling.n completions for each. on_finish is told of each as soon as it is answered."""

    def stream(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
        """Draw one answer and yield its tokens as they come; leaving the loop early aborts it."""

    def load_weights(self, model: Transformer, version: int, running: WhileRunning = "refuse") -> None:
        """Draw with these weights from now on; every completion carries their version."""

    def health(self) -> Health:
        """How it is."""


def check_request(
    prompt: Sequence[int], sampling: SamplingParams, max_model_len: int, vocab_size: int
) -> tuple[int, ...]:
    """The ids of a prompt: whole numbers in a sequence, an array of numpy or a tensor of one dimension.

    Raises RequestError for a request that no engine of this context and vocabulary can serve.
    """
    prompt_token_ids = _token_ids("the prompt", prompt, vocab_size)
    total = len(prompt_token_ids) + sampling.max_tokens
    if not prompt_token_ids:
        raise RequestError("the prompt is empty; it needs at least a BOS token")
    if total > max_model_len:
        raise RequestError(
            f"prompt is {len(prompt_token_ids):,} tokens; this model takes {max_model_len:,} including "
            f"max_tokens={sampling.max_tokens:,}; shorten the prompt or max_tokens by {total - max_model_len:,}"
        )
    for name in ("stop_token_ids", "think_end_token_ids", "logit_bias"):
        _token_ids(name, getattr(sampling, name), vocab_size)
    return prompt_token_ids


def _token_ids(name: str, given: Any, vocab_size: int) -> tuple[int, ...]:
    """Token ids from a sequence, an array or a tensor of one dimension. Raises RequestError where they are no such."""
    found = given.tolist() if hasattr(given, "tolist") else given  # of any library
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise RequestError(f"{name} is {_short(given)}; give a sequence of token ids")
    ids = tuple(found)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise RequestError(f"{name} holds {_short(token)}; token ids are whole numbers, one prompt a sequence")
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise RequestError(f"{name} names token {wrong}; this vocabulary has 0..{vocab_size - 1}")
    return tuple(map(int, ids))


def _short(value: object) -> str:
    """A value and its type, for a message."""
    text = " ".join(repr(value).split())
    return f"{text[:40]}{'...' if len(text) > 40 else ''} ({type(value).__name__})"
