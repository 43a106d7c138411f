"""What a step of the engine changes: new tokens and finished completions."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, groupby
from operator import itemgetter
from typing import NamedTuple

import numpy

from thinkstack.engine.sequence_table import Request, TopLogprobs, pairs
from thinkstack.types import FinishReason


@dataclass(frozen=True, slots=True)
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
        columns = zip(self.completions, self.token_ids.tolist(), self.logprobs.tolist(), count(), strict=False)
        for (request, index), tokens in groupby(columns, key=itemgetter(0)):
            _, token_ids, logprobs, numbers = zip(*tokens, strict=True)
            likely = tuple(pairs(self.top_logprobs[number]) for number in numbers if number in self.top_logprobs)
            yield CompletionUpdate(request, index, token_ids, logprobs, likely, reasons.pop((request, index), None))
        for (request, index), reason in reasons.items():
            yield CompletionUpdate(request, index, (), (), (), reason)


NO_OUTPUT = StepOutput([], numpy.zeros(0, numpy.int64), numpy.zeros(0, numpy.float32), {}, [])
"""The output of a step without tokens."""
