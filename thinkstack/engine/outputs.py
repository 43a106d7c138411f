"""What a step of the engine changes: new tokens and finished completions."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy

from thinkstack.engine.sequence_table import Request, TopLogprobs, pairs
from thinkstack.types import FinishReason


@dataclass(slots=True)
class CompletionUpdate:
    """The change of one completion in one step."""

    request: Request
    index: int
    """Index of the completion in the request."""
    token_ids: tuple[int, ...]
    """New tokens; empty if the completion ended with an error."""
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    """Most likely alternatives of each token as (id, log-probability), best first; empty if not requested."""
    finish_reason: FinishReason | None
    """None while the completion runs; otherwise request.completions[index] is set."""


def joined(updates: Iterable[CompletionUpdate]) -> list[CompletionUpdate]:
    """Updates of one request with those of each completion joined, in the order of their completions' first ones."""
    found: dict[int, CompletionUpdate] = {}
    for update in updates:
        before = found.get(update.index)
        if before is None:
            found[update.index] = update
        else:
            tokens = before.token_ids + update.token_ids, before.logprobs + update.logprobs
            likely, reason = before.top_logprobs + update.top_logprobs, update.finish_reason
            found[update.index] = CompletionUpdate(update.request, update.index, *tokens, likely, reason)
    return list(found.values())


class StepOutput(NamedTuple):
    """The new tokens of a step (N) as columns, which cost nothing until they are read."""

    completions: list[tuple[Request, int]]
    """Request and completion index of each token; tokens of one completion are adjacent, in order."""
    token_ids: numpy.ndarray
    """(N,) int64."""
    logprobs: numpy.ndarray
    """(N,) fp32."""
    top_logprobs: dict[int, TopLogprobs]
    """Most likely alternatives by number of the token, for requests that ask for them."""
    finished: list[tuple[tuple[Request, int], FinishReason]]
    """The completions that ended, each with the reason."""

    def updates(self) -> Iterator[CompletionUpdate]:
        """The changes by completion."""
        reasons = dict(self.finished)
        token_ids, logprobs = self.token_ids.tolist(), self.logprobs.tolist()
        start = 0
        for number, completion in enumerate(self.completions, 1):
            if number < len(self.completions) and self.completions[number] == completion:
                continue
            (request, index), own = completion, slice(start, number)
            chosen = range(start, number) if self.top_logprobs else ()
            likely = tuple(pairs(self.top_logprobs[place]) for place in chosen if place in self.top_logprobs)
            reason = reasons.pop(completion, None) if reasons else None
            yield CompletionUpdate(request, index, tuple(token_ids[own]), tuple(logprobs[own]), likely, reason)
            start = number
        for (request, index), reason in reasons.items():
            yield CompletionUpdate(request, index, (), (), (), reason)


NO_OUTPUT = StepOutput([], numpy.zeros(0, numpy.int64), numpy.zeros(0, numpy.float32), {}, [])
"""The output of a step without tokens."""
