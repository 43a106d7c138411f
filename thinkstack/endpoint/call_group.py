"""The requests of one call of an endpoint: which are left, and why they stop early."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager

from thinkstack.endpoint.budget import BudgetExceeded
from thinkstack.endpoint.requests import EndpointCall
from thinkstack.endpoint.server import AttemptFailed
from thinkstack.types import RequestError

log = logging.getLogger(__name__)
SHOWN_FAILURES = 3
REFUSALS = {400, 413, 422}
"""Statuses of a request whose content the server does not take."""
MOST_REFUSALS = 8


class CallGroup:
    """Requests that run side by side. After an error none starts, and the running ones finish."""

    def __init__(self, calls: Mapping[str, EndpointCall], num_requests: int, cache: str, accept_refusals: bool = False):
        """num_requests: with those that were in the cache. cache: the folder of the cache, for messages.
        accept_refusals: whether a request whose content the server refuses counts as answered."""
        self.calls = calls
        self.pending = self._pending()
        """Requests that no worker has taken; ends early after an error."""
        self.num_answered = 0
        self._num_before, self._cache = num_requests - len(calls), cache
        self._error: Exception | None = None
        self._failures: list[AttemptFailed] = []
        self._refusals: dict[str, AttemptFailed] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._waiting: set[asyncio.Task[None]] = set()
        self._is_cancelled, self._accept_refusals = False, accept_refusals

    def _pending(self) -> Iterator[tuple[str, EndpointCall]]:
        for item in self.calls.items():
            if self._error is not None:
                return
            yield item

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within this block nothing is asked: an error of another request ends the worker."""
        if self._error is not None:
            raise asyncio.CancelledError
        task = asyncio.current_task()
        assert task is not None, "workers are tasks"
        self._waiting.add(task)
        try:
            yield
        finally:
            self._waiting.discard(task)

    def stop(self, error: Exception) -> None:
        """Start no further request; the first error counts."""
        if self._error is not None:
            return
        self._error = error
        num_running = sum(not task.done() and task not in self._waiting for task in self._tasks) - 1
        if num_running > 0:
            log.warning("%s; waiting for the %d running requests", error, num_running)
        for task in self._waiting:
            task.cancel()

    def fail(self, key: str, failure: AttemptFailed) -> None:
        """Count a request that failed for good; one that would fail again stops all.

        Accepted refusals stop all if no request was answered before MOST_REFUSALS of them: then the settings are wrong.
        """
        if failure.can_retry:
            log.warning("a request failed for good: %s", failure)
            self._failures.append(failure)
            return
        if self._accept_refusals and failure.status in REFUSALS:
            self._refusals[key] = failure
            if self._has_answers or len(self._refusals) < MOST_REFUSALS:
                return
        self.stop(failure)

    @property
    def _has_answers(self) -> bool:
        """Whether a request of the group was answered, by the server or from the cache."""
        return bool(self.num_answered or self._num_before)

    def accepted_refusals(self) -> dict[str, AttemptFailed]:
        """The refused requests of a group that has run, by key; if all were refused, the first refusal is its error."""
        if self._refusals and not self._has_answers:
            self.stop(next(iter(self._refusals.values())))
        return {} if self._error else self._refusals

    def cancel(self) -> None:
        """End the running requests at once."""
        self._is_cancelled = True
        for task in self._tasks:
            task.cancel()

    async def run(self, worker: Callable[[], Awaitable[None]], count: int) -> None:
        """Run this many workers side by side to their end."""
        if not self._is_cancelled:
            self._tasks = [asyncio.create_task(self._guard(worker)) for _ in range(count)]
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _guard(self, worker: Callable[[], Awaitable[None]]) -> None:
        try:
            await worker()
        except Exception as error:  # raised by raise_error
            self.stop(error)

    def raise_error(self) -> None:
        """Raise the error that ended the group, if one did, with what is finished and how to go on."""
        error, total = self._error, self._num_before + len(self.calls)
        kept = f" and kept in {self._cache}" if self._cache else ""
        done = f"{self._num_before + self.num_answered:,} of {total:,} requests are finished{kept}"
        if isinstance(error, BudgetExceeded):
            raise BudgetExceeded(f"{error}; {done}; raise the budget and run again to go on") from error
        if isinstance(error, AttemptFailed):
            raise RequestError(f"{error}; {done}; run again to go on") from error
        if error is not None:
            raise error
        if self._failures:
            reasons = "; ".join(dict.fromkeys(str(failure) for failure in self._failures[:SHOWN_FAILURES]))
            message = (
                f"{len(self._failures):,} requests failed for good ({reasons}); {done}; run again to ask for the rest"
            )
            raise RequestError(message) from self._failures[0]
