"""The interfaces of engines and of services, each in this process or over a pool of servers; checks of requests."""

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from thinkstack.models.transformer import Transformer
from thinkstack.types import Completion, RequestError, SamplingParams

if TYPE_CHECKING:
    from thinkstack.engine.grammar import StructuredOutputs
    from thinkstack.engine.service import Generation

OnFinish = Callable[[int, list[Completion]], None]
"""Function that is called with the index of a prompt and the completions of that prompt."""
WhileRunning = Literal["refuse", "drain", "abort", "keep"]
"""What happens to running requests when the weights change. "refuse": raise RequestError instead of changing the
weights. "drain": finish the requests with the old weights first. "abort": abort the requests. "keep": continue the
requests with the new weights, after recomputing their context."""


class Overloaded(RuntimeError):
    """A valid request cannot be served now; the same request may succeed later."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """The state of an engine."""

    alive: bool
    """Whether the engine accepts requests."""
    running: int
    """Number of running sequences; for servers, of requests in flight."""
    waiting: int
    """Number of queue entries that wait for memory or a row."""
    failed: int
    """Number of completions that ended in an error so far; for servers, number of failed requests."""
    last_error: str | None
    """The last error message."""
    version: int
    """Version of the weights in use."""


class AnyEngine(Protocol):
    """The interface of `Engine` and `RemoteEngine`; recipes work with either."""

    max_model_len: int
    """Maximum number of tokens of prompt and completion together."""
    version: int
    """Version of the weights in use; a completion has the version that sampled its first token."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[SamplingParams],
        on_finish: OnFinish | None = None,
    ) -> list[list[Completion]]:
        """Generate sampling.n completions for each prompt. on_finish is called for each prompt that is finished."""

    def stream(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Iterator[int]:
        """Yield the tokens of one completion as they are sampled; leaving the loop early aborts it."""

    def load_weights(self, model: Transformer, version: int, running: WhileRunning = "refuse") -> None:
        """Use the weights of `model` from now on; `version` is recorded in completions."""

    def health(self) -> Health:
        """The state of the engine."""


@dataclass(frozen=True, kw_only=True)
class ServiceStatus:
    """What a service does now. Numbers are consistent with each other only between steps."""

    running: int
    """Completions that have a row."""
    waiting: int
    """Queue entries: requests that wait for memory or a row, and preempted completions."""
    free_blocks: int
    num_blocks: int
    num_preemptions: int
    num_steps: int
    step_seconds: float
    """Duration of all steps together."""
    num_sampled: int
    """Tokens sampled so far."""
    seconds_since_heartbeat: float
    """How long the thread has been in the same step or command; 0 while it sleeps."""
    failure: str | None
    """Why the service serves no requests any more."""


class AnyService(Protocol):
    """The interface of `EngineService` and `RemoteService`; the API server works with either."""

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of prompt and completion together."""

    @property
    def status(self) -> ServiceStatus:
        """The state now."""

    async def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        tenant: str = "",
        priority: int = 0,
        cache_salt: str = "",
        grammar: "StructuredOutputs | None" = None,
        max_wait: float = math.inf,
    ) -> "Generation":
        """Queue a request. Raises RequestError, Overloaded."""

    async def close(self, max_wait: float = 0.0) -> None:
        """Refuse new requests, finish the others within `max_wait` seconds, and abort the rest."""

    def post(self, command: Callable[[], None]) -> None:
        """Execute a command where requests are served; this and the methods below are for `Generation`."""

    async def call(self, command: Callable[[], None]) -> None:
        """`post`, then wait for the end of the command."""

    def abort_now(self, generation: "Generation") -> None:
        """Abort a generation; in a command."""

    def end_now(self, generation: "Generation", index: int) -> None:
        """End one completion of a generation; in a command."""

    def end_thinking_now(self, generation: "Generation") -> None:
        """Close the thinking of a generation; in a command."""


def check_request(
    prompt: Sequence[int], sampling: SamplingParams, max_model_len: int, vocab_size: int
) -> tuple[int, ...]:
    """Validate a request and return the token ids of the prompt: a sequence of integers, or a one-dimensional numpy
    array or tensor.

    Raises RequestError for a request that exceeds this context length or vocabulary.
    """
    prompt_token_ids = _token_ids("prompt", prompt, vocab_size)
    total = len(prompt_token_ids) + sampling.max_tokens
    if not prompt_token_ids:
        raise RequestError("the prompt is empty; it needs at least one token, such as BOS", "prompt")
    if total > max_model_len:
        raise RequestError(
            f"prompt is {len(prompt_token_ids):,} tokens; this model supports {max_model_len:,} including "
            f"max_tokens={sampling.max_tokens:,}; shorten the prompt or max_tokens by {total - max_model_len:,}",
            "prompt" if len(prompt_token_ids) >= max_model_len else "max_tokens",
        )
    for name in ("stop_token_ids", "think_end_token_ids", "allowed_token_ids", "logit_bias"):
        _token_ids(name, getattr(sampling, name), vocab_size)
    return prompt_token_ids


def _token_ids(name: str, given: Any, vocab_size: int) -> tuple[int, ...]:
    """Token ids from a sequence, or from a one-dimensional array or tensor. Raises RequestError for other values."""
    found = given.tolist() if hasattr(given, "tolist") else given  # of any library
    if isinstance(found, str) or not isinstance(found, Iterable):
        raise RequestError(f"{name} is {_short(given)}; use a sequence of token ids", name)
    ids = tuple(found)
    for token in ids if set(map(type, ids)) - {int} else ():  # the question for Integral takes 0.2 us a token
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise RequestError(
                f"{name} contains {_short(token)}; token ids are integers, and each prompt is one sequence", name
            )
    if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise RequestError(f"{name} contains token id {wrong}; the vocabulary has ids 0..{vocab_size - 1}", name)
    return tuple(map(int, ids))


def _short(value: object) -> str:
    """A value and its type, for a message."""
    text = " ".join(repr(value).split())
    return f"{text[:40]}{'...' if len(text) > 40 else ''} ({type(value).__name__})"
