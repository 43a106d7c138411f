"""The interface of all engines, ours and a pool of servers, and the request checks they share."""

import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from thinkstack.models.transformer import Transformer
from thinkstack.types import Completion, RequestError, SamplingParams

OnFinish = Callable[[int, list[Completion]], None]
"""Called with the index of a prompt and its completions."""
WhileRunning = Literal["refuse", "drain", "abort", "keep"]
"""What happens to running requests when the weights change: "refuse" the change; "drain" them first with the old
weights; "abort" them; "keep" them running with the new weights, after recomputing their context."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """The state of an engine."""

    alive: bool
    """Whether the engine accepts requests."""
    running: int
    """Running sequences; for servers, requests in flight."""
    waiting: int
    """Queue entries that wait for memory or a row."""
    failed: int
    """Completions that ended in an error so far; for servers, requests that a server failed to answer."""
    last_error: str | None
    """The last error message."""
    version: int
    """Version of the weights in use."""


class AnyEngine(Protocol):
    """The interface of `Engine` and `RemoteEngine`; recipes work with either."""

    max_model_len: int
    """Maximum tokens of prompt and completion together."""
    version: int
    """Version of the weights in use; a completion carries the version of its first token."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[SamplingParams],
        on_finish: OnFinish | None = None,
    ) -> list[list[Completion]]:
        """Generate sampling.n completions for each prompt. on_finish is called for each prompt when it is finished."""

    def stream(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
        """Yield the tokens of one completion as they are sampled; leaving the loop early aborts it."""

    def load_weights(self, model: Transformer, version: int, running: WhileRunning = "refuse") -> None:
        """Use these weights from now on; completions carry their version."""

    def health(self) -> Health:
        """The state of the engine."""


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
