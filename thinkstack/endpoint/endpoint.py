"""The client of an OpenAI-compatible endpoint: many requests at once, each answered once and paid for once."""

import asyncio
import itertools
import logging
import math
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx2

from thinkstack.endpoint.attempt import Attempts
from thinkstack.endpoint.budget import Amount, Budget, BudgetExceeded, Estimate, Spent
from thinkstack.endpoint.cache import CompletionCache
from thinkstack.endpoint.call_group import CallGroup
from thinkstack.endpoint.config import EndpointConfig
from thinkstack.endpoint.pacing import Pacer, backoff_seconds
from thinkstack.endpoint.requests import (
    EndpointCall,
    EndpointCompletion,
    EndpointReply,
    EndpointRequest,
    PromptLogprobs,
    chat_call,
    echo_call,
    make_completion,
    make_prompt_logprobs,
    refused_reply,
)
from thinkstack.endpoint.server import AttemptFailed, OpenAIServer
from thinkstack.stopping import StopRequest
from thinkstack.types import ConfigError, Interrupted, RequestError

log = logging.getLogger(__name__)
T = TypeVar("T")
Finished = queue.SimpleQueue[tuple[str, EndpointReply, bool] | None]
"""Replies on their way to the caller: key, reply, whether it is from the cache; None is the end."""
POLL_SECONDS = 0.05
"""Maximum time until a request to stop is seen."""
LOG_SECONDS = 15.0
"""Minimum time between two log lines about retries."""
FIRST_RETRIES = 3
"""Further attempts at a server that cannot be reached and has never answered: its address may be wrong."""
MAX_RETRY_AFTER_SECONDS = 3600.0
"""A server that asks to wait longer ends the run, which goes on later."""


class Endpoint:
    """An endpoint, its cache and its budget. May be used from several threads, which then share the limits.

    Requests run in a thread of their own; callbacks are called in the caller's thread.
    """

    def __init__(
        self,
        cfg: EndpointConfig,
        api_key: str = "",
        transport: httpx2.AsyncBaseTransport | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ):
        """api_key: default that of `find_api_key`. transport: an httpx2 transport, for tests. loop: an event loop whose
        clock is that of all waits, for tests.

        Raises ConfigError for an address that is not one, a missing key or a cache that cannot be read.
        """
        if not cfg.url:
            raise ConfigError("endpoint.url is not set; give the address of a server, such as http://127.0.0.1:8000/v1")
        self.cfg = cfg
        variable = cfg.api_key_env or "OPENAI_API_KEY"
        self._server = OpenAIServer(cfg.url, api_key, cfg.api_key_env, key_hint=f"set {variable} to the server's key")
        self._cache = CompletionCache(Path(cfg.cache)) if cfg.cache else None
        self._loop = loop or asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        self._start = threading.Lock()
        self._budget = Budget(cfg, self._loop.time)
        self._pacer = Pacer(cfg, self._loop.time)
        self._attempts = Attempts(cfg, self._server, self._budget, self._loop.time, transport)
        self._slots = asyncio.Semaphore(cfg.concurrency)
        self._model = cfg.model
        self._counted: set[str] = set()
        """Keys of the replies that are in the budget."""
        self._running: dict[str, float] = {}
        """By key: when the first attempt at a running request started."""
        self._num_left = self._num_sending = self._num_answered = self._num_failed_in_row = 0
        self._logged = float("-inf")

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close connections, thread and cache."""
        if self._thread is not None:
            self._on_loop(self._attempts.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        if not self._loop.is_closed():
            self._loop.close()
        self._thread = None
        if self._cache is not None:
            self._cache.close()

    @property
    def model(self) -> str:
        """The name of the model on the server. Raises ConfigError if there is none, RequestError if the server does not
        list its models."""
        if not self._model:
            names = self.list_models()
            if not names:
                raise ConfigError(f"{self._server.url}/models lists no models; check the address, or set model")
            self._model = names[0]
        return self._model

    @property
    def spent(self) -> Spent:
        """What the requests so far have used."""
        return self._budget.spent

    def estimate(self, requests: int | None = None) -> Estimate | None:
        """What the requests that are left will take, by those that are finished; None before any is finished.

        requests: their number; None: those of the calls of `complete` and `prompt_logprobs` that run now.
        """
        if requests is not None:
            return self._budget.estimate(requests)
        now = self._loop.time()
        return self._budget.estimate(self._num_left, [now - start for start in list(self._running.values())])

    def list_models(self) -> list[str]:
        """The models that the server lists; empty if it lists none. Raises RequestError."""
        return self._on_loop(self._attempts.list_models())

    def complete(
        self,
        requests: Sequence[EndpointRequest],
        on_finish: Callable[[int, EndpointCompletion], None] | None = None,
        stop: StopRequest | None = None,
        accept_refusals: bool = False,
    ) -> list[EndpointCompletion]:
        """The completions of requests, in their order. Requests that are equal, index included, are asked once.

        on_finish: called with the position of a request and its completion as soon as it is in the cache. stop: ends
        the running requests as soon as it is requested. accept_refusals: a request that the server refuses for its
        content (400, 413, 422), such as a prompt that is too long, while it answers others, has a completion with the
        finish_reason "refused", the reason as its content and no tokens; it is asked again by a later call.
        Raises RequestError if a request failed for good, BudgetExceeded if the budget does not allow another one, both
        after the running ones have finished; Interrupted for `stop`, at once. All that finished was reported.
        """
        calls = [chat_call(request, self.cfg, self.model) for request in requests]

        def make(reply: EndpointReply, call: EndpointCall, from_cache: bool) -> EndpointCompletion:
            return make_completion(reply, self.cfg.opens_thinking, from_cache)

        return self._run(calls, make, on_finish, stop, accept_refusals)

    def prompt_logprobs(
        self,
        prompts: Sequence[str | Sequence[int]],
        on_finish: Callable[[int, PromptLogprobs], None] | None = None,
        stop: StopRequest | None = None,
        max_tokens: int = 1,
    ) -> list[PromptLogprobs]:
        """The log-probabilities of the tokens of prompts, which are texts or token ids, by /completions with echo.

        max_tokens: tokens sampled after the prompt, 0 or 1; many servers refuse 0. Other arguments and errors as in
        `complete`; raises ConfigError for a server that does not score prompts.
        """
        if max_tokens not in (0, 1):
            raise RequestError(f"max_tokens={max_tokens} must be 0 or 1 to score a prompt", "max_tokens")
        calls = [echo_call(prompt, self.model, max_tokens) for prompt in prompts]
        return self._run(calls, make_prompt_logprobs, on_finish, stop)

    # -- in the thread of the caller

    def _run(
        self,
        calls: Sequence[EndpointCall],
        make: Callable[[EndpointReply, EndpointCall, bool], T],
        on_finish: Callable[[int, T], None] | None,
        stop: StopRequest | None,
        accept_refusals: bool = False,
    ) -> list[T]:
        places: dict[str, list[int]] = {}
        for place, call in enumerate(calls):
            self._budget.check(call)
            places.setdefault(call.key(self._server.url), []).append(place)
        found: dict[int, T] = {}

        def report(key: str, reply: EndpointReply, from_cache: bool) -> None:
            for place in places[key]:
                found[place] = make(reply, calls[place], from_cache)
                if on_finish is not None:
                    on_finish(place, found[place])

        waiting: dict[str, EndpointCall] = {}
        for key, copies in places.items():
            _raise_if_stopped(stop)
            if (reply := self._cached(key)) is None:
                waiting[key] = calls[copies[0]]
            else:
                report(key, reply, True)
        if waiting:
            self._ask(CallGroup(waiting, len(places), self.cfg.cache, accept_refusals), report, stop)
        return [found[place] for place in range(len(calls))]

    def _ask(
        self, group: CallGroup, report: Callable[[str, EndpointReply, bool], None], stop: StopRequest | None
    ) -> None:
        """Ask the server, and report replies as they come. Raises the error of the group."""
        if self._cache is not None:
            self._cache.open()
        finished: Finished = queue.SimpleQueue()
        self._start_thread()
        future = asyncio.run_coroutine_threadsafe(self._work(group, finished), self._loop)
        try:
            for item in _items(finished, stop):
                report(*item)
        except BaseException as error:
            self._loop.call_soon_threadsafe(group.cancel)
            for item in iter(finished.get, None):  # what was paid for until the last request had ended
                if isinstance(error, Interrupted | KeyboardInterrupt):
                    report(*item)
            raise
        future.result()
        group.raise_error()

    def _cached(self, key: str) -> EndpointReply | None:
        """The reply in the cache, which the budget counts."""
        if self._cache is None or (reply := EndpointReply.from_row(self._cache.get(key))) is None:
            return None
        if key not in self._counted:
            self._counted.add(key)
            self._budget.add_from_cache(reply)
        return reply

    def _start_thread(self) -> None:
        with self._start:
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True)
                self._thread.start()

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        self._start_thread()
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # -- in the thread of the event loop

    async def _work(self, group: CallGroup, finished: Finished) -> None:
        """Ask all requests of a group; put replies, and None at the end."""
        num_left = len(group.calls)
        self._num_left += num_left
        try:
            await group.run(lambda: self._worker(group, finished), min(self.cfg.concurrency, num_left))
            for key, failure in group.accepted_refusals().items():
                finished.put((key, refused_reply(str(failure)), False))
        finally:
            self._num_left -= num_left - group.num_answered
            finished.put(None)

    async def _worker(self, group: CallGroup, finished: Finished) -> None:
        for key, call in group.pending:
            with group.waiting():
                await self._slots.acquire()
            self._running[key] = self._loop.time()
            try:
                from_cache, reply = True, self._cached(key)  # another process may have been faster
                if reply is None:
                    from_cache, reply = False, await self._answer(group, key, call)
                    self._store(group, key, reply)
                finished.put((key, reply, from_cache))
                group.num_answered += 1
                self._num_left -= 1
            except BudgetExceeded as error:
                group.stop(error)
            except AttemptFailed as failure:
                self._budget.count(failures=1)
                group.fail(key, failure)
            finally:
                self._running.pop(key, None)
                self._slots.release()

    async def _answer(self, group: CallGroup, key: str, call: EndpointCall) -> EndpointReply:
        """Attempt a request until it is answered. Raises AttemptFailed and BudgetExceeded."""
        num_before, started = 0, self._loop.time()
        for attempt in itertools.count(1):
            with group.waiting():
                need = await self._admit(call)
            used = 0
            try:
                reply = await self._send(call, attempt)
                used = reply.prompt_tokens + reply.completion_tokens
                self._budget.add(reply, self._loop.time() - started)
                return reply
            except AttemptFailed as failure:
                num_before = self._num_answered if attempt == 1 else num_before
                self._raise_if_last(failure, attempt, num_before)
                seconds = self._backoff(failure, attempt, key)
            finally:
                self._budget.release(need)
                self._pacer.give_back(need.tokens - used)
            with group.waiting():
                await asyncio.sleep(min(seconds, self._budget.seconds_left()))
        raise AssertionError("the loop ends by a return or an error")

    async def _send(self, call: EndpointCall, attempt: int) -> EndpointReply:
        self._num_sending += 1
        try:
            reply = await self._attempts.send(call, attempt)
        finally:
            self._num_sending -= 1
        self._num_answered, self._num_failed_in_row = self._num_answered + 1, 0
        return reply

    async def _admit(self, call: EndpointCall) -> Amount:
        """Wait until the budget and the limits per minute allow a request. Returns its reservation."""
        need = await self._budget.reserve(call)
        left = self._budget.seconds_left()
        try:
            async with asyncio.timeout(None if math.isinf(left) else left):
                await self._pacer.wait(need.tokens)
        except TimeoutError as error:
            self._budget.release(need)
            raise BudgetExceeded(self._budget.time_is_over) from error
        except BaseException:
            self._budget.release(need)
            raise
        return need

    def _raise_if_last(self, failure: AttemptFailed, attempt: int, num_before: int) -> None:
        """Raise the failure if there is no further attempt; with can_retry=False if other requests would fail too.

        The server is dead if no request was answered since the first attempt failed (num_before: how many were then),
        and none waits for an answer, or as many failed in a row as may run at once.
        """
        if not failure.can_retry:
            raise failure
        if failure.retry_after_seconds > MAX_RETRY_AFTER_SECONDS:
            wait = f"it asks to wait {failure.retry_after_seconds:,.0f} s"
            raise AttemptFailed(f"{failure}; {wait}", failure.status) from failure
        is_new = failure.is_unreachable and not self._num_answered
        if attempt <= (min(self.cfg.retries, FIRST_RETRIES) if is_new else self.cfg.retries):
            return
        self._num_failed_in_row += 1
        is_silent = not self._num_sending or self._num_failed_in_row >= self.cfg.concurrency
        if self._num_answered == num_before and is_silent:
            message = f"{failure}; no request was answered during {attempt} attempts"
            raise AttemptFailed(message, failure.status) from failure
        raise failure

    def _backoff(self, failure: AttemptFailed, attempt: int, key: str) -> float:
        """The seconds until the next attempt; a server that asks to wait gets no other request either."""
        self._budget.count(retries=1)
        self._pacer.pause(failure.retry_after_seconds)
        seconds = backoff_seconds(attempt, failure.retry_after_seconds, self.cfg.max_backoff_seconds, key)
        if self._loop.time() - self._logged >= LOG_SECONDS:
            self._logged = self._loop.time()
            log.warning("%s; attempt %d of %d in %.1f s", failure, attempt + 1, self.cfg.retries + 1, seconds)
        return seconds

    def _store(self, group: CallGroup, key: str, reply: EndpointReply) -> None:
        """Write a reply to the cache. If that fails, it is reported nevertheless, and nothing else is asked."""
        self._counted.add(key)
        if self._cache is not None:
            try:
                self._cache.put(key, reply.as_row())
            except ConfigError as error:
                group.stop(error)


def _items(finished: Finished, stop: StopRequest | None) -> Iterator[tuple[str, EndpointReply, bool]]:
    """What the event loop puts, up to its end. Raises Interrupted for `stop`."""
    while True:
        _raise_if_stopped(stop)
        try:
            item = finished.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        if item is None:
            return
        yield item


def _raise_if_stopped(stop: StopRequest | None) -> None:
    if stop is not None and stop.is_requested:
        raise Interrupted
