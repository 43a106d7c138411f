"""When requests start: limits per minute, pauses that a server asks for, and the time before another attempt."""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress

from thinkstack.endpoint.config import EndpointConfig

FIRST_BACKOFF_SECONDS = 0.5


class Pacer:
    """Starts requests in the order in which they come, at most so many requests and tokens per minute.

    A token bucket that holds one request: starts are spread evenly, so that no minute has more requests than the limit,
    and none more tokens than the limit and the last request.
    """

    def __init__(self, cfg: EndpointConfig, time: Callable[[], float]):
        """time: a clock in seconds."""
        self._time = time
        self._seconds_per_request = 60 / cfg.requests_per_minute if cfg.requests_per_minute else 0.0
        self._seconds_per_token = 60 / cfg.tokens_per_minute if cfg.tokens_per_minute else 0.0
        self._next_request = self._next_token = self._paused_until = float("-inf")
        """When the next request may start, by each of the limits."""
        self._turn, self._changed = asyncio.Lock(), asyncio.Event()

    async def wait(self, tokens: int) -> None:
        """Wait for the turn of a request that may take this many tokens."""
        async with self._turn:
            while (seconds := self._start() - self._time()) > 0:
                self._changed.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._changed.wait()
            now = self._time()
            self._next_request = now + self._seconds_per_request
            self._next_token = now + tokens * self._seconds_per_token

    def give_back(self, tokens: int) -> None:
        """Return tokens that a request did not take, or take more (tokens < 0)."""
        self._next_token -= tokens * self._seconds_per_token
        self._changed.set()

    def pause(self, seconds: float) -> None:
        """Start nothing for some time."""
        self._paused_until = max(self._paused_until, self._time() + seconds)

    def _start(self) -> float:
        return max(self._next_request, self._next_token, self._paused_until)


def backoff_seconds(attempt: int, retry_after: float, max_seconds: float, key: str) -> float:
    """The time before attempt + 1: doubles from half a second up to max_seconds, less up to a half; at least the
    server's Retry-After and up to a tenth more.

    attempt: number of attempts so far, from 1. key: seed of the differences, so that requests that failed together do
    not come back together.
    """
    share = random.Random(f"{key} {attempt}").random()
    grown = min(max_seconds, FIRST_BACKOFF_SECONDS * 2.0 ** min(attempt - 1, 40)) * (1 - share / 2)
    return max(grown, retry_after * (1 + share / 10))
