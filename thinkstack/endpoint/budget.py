"""What an endpoint has cost, what it may cost, and what the rest will cost."""

import asyncio
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from thinkstack.endpoint.config import EndpointConfig
from thinkstack.endpoint.estimates import Durations, seconds_left, work_left
from thinkstack.endpoint.requests import EndpointCall, EndpointReply
from thinkstack.types import ConfigError, RequestError


class BudgetExceeded(RequestError):
    """The budget does not allow another request. What was paid for was reported and is in the cache."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What the requests of this process have used so far."""

    requests: int = 0
    """Requests that were answered by the server."""
    from_cache: int = 0
    """Requests that were answered from the cache, at no cost."""
    retries: int = 0
    """Further attempts."""
    failures: int = 0
    """Requests that failed for good."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that the server reports to have had in its cache."""
    completion_tokens: int = 0
    num_estimated: int = 0
    """Requests of a server that reports no usage, whose tokens are estimates."""
    lost_tokens: int = 0
    """Tokens of answers that broke off, at most: the server may have charged them."""
    cost: float = 0.0
    """In the currency of the prices, lost tokens included."""

    @property
    def total_tokens(self) -> int:
        """Prompts, completions and lost tokens."""
        return self.prompt_tokens + self.completion_tokens + self.lost_tokens


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the requests that are left will take, by what those before them took."""

    requests: int
    """Requests that are left."""
    seconds: float
    tokens: int
    cost: float
    """In the currency of the prices."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """Tokens and their cost."""

    tokens: int
    cost: float


class Budget:
    """Counts what requests cost. A request starts only if the most that all running ones may cost still fits.

    Completions that an earlier run paid for count towards max_tokens_total and max_cost, so that a run that was
    interrupted has one budget.
    """

    def __init__(self, cfg: EndpointConfig, time: Callable[[], float]):
        """time: the clock of max_seconds, in seconds."""
        self.cfg, self.spent = cfg, Spent()
        self._time = time
        self._started: float | None = None
        self._changed, self._lock = asyncio.Event(), threading.Lock()
        self._reserved_tokens, self._reserved_cost, self._num_reserved = 0, 0.0, 0
        self._before = Amount(tokens=0, cost=0.0)
        """Of completions that an earlier run paid for."""
        self._measured = Amount(tokens=0, cost=0.0)
        self._durations = Durations()
        """Of finished requests, those of earlier runs included, and how long each kept its place of `concurrency`."""

    def check(self, call: EndpointCall) -> None:
        """Raise ConfigError for a request whose worst case is unknown, if there is a budget of tokens or money."""
        if call.max_tokens is None and (self.cfg.max_tokens_total or self.cfg.max_cost):
            name = "max_tokens_total" if self.cfg.max_tokens_total else "max_cost"
            raise ConfigError(f"{name} needs max_tokens in each request, which bounds what it may cost; set it")

    def worst_case(self, call: EndpointCall) -> Amount:
        """The most that one attempt may cost: the prompt at one token per byte, and max_tokens."""
        return self._amount(call.max_prompt_tokens, 0, call.max_tokens or 0)

    async def reserve(self, call: EndpointCall) -> Amount:
        """Wait until the worst case of a request fits. Raises BudgetExceeded if nothing runs whose end could help."""
        need = self.worst_case(call)
        while reason := self.missing(need):
            if not self._num_reserved or self.seconds_left() <= 0:
                raise BudgetExceeded(reason)
            await self._changed.wait()
        self._reserved_tokens += need.tokens
        self._reserved_cost += need.cost
        self._num_reserved += 1
        return need

    def release(self, need: Amount) -> None:
        """End a reservation."""
        self._reserved_tokens -= need.tokens
        self._num_reserved -= 1
        self._reserved_cost = self._reserved_cost - need.cost if self._num_reserved else 0.0  # no rounding stays
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def missing(self, need: Amount) -> str:
        """Why a request does not fit beside the running ones; empty if it does."""
        cfg, spent = self.cfg, self.spent
        used_tokens = spent.total_tokens + self._before.tokens
        used_cost = spent.cost + self._before.cost
        if self.seconds_left() <= 0:
            return self.time_is_over
        if cfg.max_tokens_total and used_tokens + self._reserved_tokens + need.tokens > cfg.max_tokens_total:
            return (
                f"max_tokens_total={cfg.max_tokens_total:,} is reached: {used_tokens:,} tokens are spent, and the next "
                f"request may take {need.tokens:,}"
            )
        if cfg.max_cost and used_cost + self._reserved_cost + need.cost > cfg.max_cost * (1 + 1e-12):
            return (
                f"max_cost={cfg.max_cost:g} is reached: {used_cost:.4g} is spent, and the next request may cost "
                f"{need.cost:.4g}"
            )
        return ""

    @property
    def time_is_over(self) -> str:
        """The reason to stop when no time is left."""
        return f"max_seconds={self.cfg.max_seconds:g} are over"

    def seconds_left(self) -> float:
        """Time in which requests may still start; it counts from the first call of this."""
        self._started = self._time() if self._started is None else self._started
        return self._started + self.cfg.max_seconds - self._time() if self.cfg.max_seconds else math.inf

    def add(self, reply: EndpointReply, busy_seconds: float) -> None:
        """Count a reply of the server. busy_seconds: the time since the first attempt."""
        amount = self._amount(reply.prompt_tokens, reply.cached_tokens or 0, reply.completion_tokens)
        with self._lock:
            spent = self.spent
            self.spent = replace(
                spent,
                requests=spent.requests + 1,
                prompt_tokens=spent.prompt_tokens + reply.prompt_tokens,
                cached_tokens=spent.cached_tokens + (reply.cached_tokens or 0),
                completion_tokens=spent.completion_tokens + reply.completion_tokens,
                num_estimated=spent.num_estimated + reply.is_estimated,
                cost=spent.cost + amount.cost,
            )
            self._measure(amount, busy_seconds)

    def add_from_cache(self, reply: EndpointReply) -> None:
        """Count a reply that was paid for before."""
        amount = self._amount(reply.prompt_tokens, reply.cached_tokens or 0, reply.completion_tokens)
        with self._lock:
            self.spent = replace(self.spent, from_cache=self.spent.from_cache + 1)
            self._before = Amount(tokens=self._before.tokens + amount.tokens, cost=self._before.cost + amount.cost)
            self._measure(amount, reply.seconds)

    def add_lost(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count an answer that broke off, by the most that the server may have charged."""
        amount = self._amount(prompt_tokens, 0, completion_tokens)
        with self._lock:
            spent = self.spent
            self.spent = replace(spent, lost_tokens=spent.lost_tokens + amount.tokens, cost=spent.cost + amount.cost)

    def count(self, retries: int = 0, failures: int = 0) -> None:
        """Count further attempts and requests that failed for good."""
        with self._lock:
            spent = self.spent
            self.spent = replace(spent, retries=spent.retries + retries, failures=spent.failures + failures)

    def estimate(self, requests: int, running_seconds: Sequence[float] = ()) -> Estimate | None:
        """What this many further requests take; None before any is finished.

        The time is that of `concurrency` requests side by side, or that of the limits per minute if it is longer.
        running_seconds: how long those of them that run have been running. Tokens and cost go with the time.
        """
        cfg, durations = self.cfg, self._durations
        if not durations.count or not requests:
            return Estimate(requests=0, seconds=0.0, tokens=0, cost=0.0) if durations.count else None
        law = durations.law(running_seconds)
        rest = work_left(law, requests, running_seconds)
        share = (rest + sum(running_seconds)) / durations.total_seconds if durations.total_seconds else 0.0
        tokens, cost = self._measured.tokens * share, self._measured.cost * share
        seconds = seconds_left(law, rest, min(cfg.concurrency, requests))
        if cfg.requests_per_minute:
            seconds = max(seconds, (requests - len(running_seconds)) * 60 / cfg.requests_per_minute)
        if cfg.tokens_per_minute:
            seconds = max(seconds, tokens * 60 / cfg.tokens_per_minute)
        return Estimate(requests=requests, seconds=seconds, tokens=round(tokens), cost=cost)

    def _measure(self, amount: Amount, seconds: float) -> None:
        self._durations.add(seconds)
        old = self._measured
        self._measured = Amount(tokens=old.tokens + amount.tokens, cost=old.cost + amount.cost)

    def _amount(self, prompt: int, cached: int, completion: int) -> Amount:
        cfg = self.cfg
        cached_price = cfg.prompt_price if cfg.cached_prompt_price is None else cfg.cached_prompt_price
        cached = min(cached, prompt)
        cost = (prompt - cached) * cfg.prompt_price + cached * cached_price + completion * cfg.completion_price
        return Amount(tokens=prompt + completion, cost=cost / 1e6)
