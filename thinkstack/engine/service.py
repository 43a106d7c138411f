"""A service: one thread that owns an engine, for event loops that submit requests and read their tokens.

The thread runs steps while there is work and sleeps otherwise. Between steps it executes commands: submit, abort, end
one completion, close thinking, load weights. New tokens are handed out once.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from thinkstack.engine.engine import Engine
from thinkstack.engine.grammar import GrammarFactory
from thinkstack.engine.interface import AnyService, Overloaded, ServiceStatus, WhileRunning, check_request
from thinkstack.engine.outputs import CompletionUpdate
from thinkstack.engine.sequence_table import Request
from thinkstack.kernels.threads import release_threads
from thinkstack.models.transformer import Transformer
from thinkstack.types import SamplingParams

log = logging.getLogger(__name__)
MAX_FAILED_STEPS = 3
"""Number of steps in a row that may fail before the service gives up."""


class EngineStopped(Overloaded):
    """The engine has failed or is shutting down; it serves no requests any more."""


class Generation:
    """The tokens of one request as they are sampled; an asynchronous iterator over lists of updates.

    Updates that nobody has read are kept, at most max_tokens per completion, so a slow reader delays nobody.
    """

    def __init__(self, service: AnyService, num_completions: int):
        self.request: Request | None = None
        """The engine's request, to be read only."""
        self.loop = asyncio.get_running_loop()
        self.open = set(range(num_completions))
        """Completions whose end is not published; used by the engine's thread."""
        self.min_seconds = 0.0
        """Shortest time between two lists before a completion ends: waking a reader costs as much as many tokens."""
        self.unsent: list[CompletionUpdate] = []
        """Updates for the next list; used by the engine's thread, as the next one."""
        self.sent_at = -math.inf
        self._service = service
        self._num_unread_ends = num_completions
        self._updates: list[CompletionUpdate] = []
        self._error: Exception | None = None
        self._is_ticked = False
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> "Generation":
        return self

    async def __anext__(self) -> list[CompletionUpdate]:
        """The updates since the last call; none after a call of `tick`. Raises Overloaded if the request waited too
        long for its start, EngineStopped if the engine stopped."""
        while not self._updates and not self._is_ticked:
            if self._error is not None:
                raise self._error
            if not self._num_unread_ends:
                raise StopAsyncIteration
            self._waiter = self.loop.create_future()
            await self._waiter
        updates, self._updates, self._is_ticked = self._updates, [], False
        self._num_unread_ends -= sum(update.finish_reason is not None for update in updates)
        return updates

    def abort(self) -> None:
        """End the unfinished completions with finish_reason="abort"; their blocks are freed before the next step."""
        if self._num_unread_ends:
            self._service.post(lambda: self._service.abort_now(self))

    def end(self, index: int) -> None:
        """End one completion with finish_reason="stop", because a stop string occurred in its text."""
        self._service.post(lambda: self._service.end_now(self, index))

    async def end_thinking(self) -> None:
        """Close the thinking of unfinished completions now. Raises RequestError without think_end_token_ids."""
        await self._service.call(lambda: self._service.end_thinking_now(self))

    def tick(self) -> None:
        """Wake the reader without an update, in the event loop, so that it can show that it is alive."""
        self._is_ticked = True
        self._wake()

    def receive(self, found: list[CompletionUpdate] | Exception) -> None:
        """Called in the event loop for new updates, and for the error that ends all."""
        if isinstance(found, Exception):
            self._error = found
        else:
            self._updates += found
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineService:
    """Owns an engine, which nobody else may call while the service runs."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._wake = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._live: dict[Request, Generation] = {}
        self._start_deadlines: dict[Request, float] = {}
        """When requests that have not started are given up, by time.monotonic."""
        self._outbox: dict[asyncio.AbstractEventLoop, list[tuple[Callable[[Any], None], Any]]] = {}
        """Functions to call, with their argument, by event loop."""
        self._after_drain: list[Callable[[], None]] = []
        self._is_closing = self._is_stopped = False
        self._busy_since: float | None = None
        self._num_steps, self._step_seconds, self._num_sampled, self._num_failed_steps = 0, 0.0, 0, 0
        self.failure: str | None = None
        release_threads()  # of the model's initialization
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), name="engine", daemon=True)
        self._thread.start()

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of prompt and completion together."""
        return self._engine.max_model_len

    @property
    def status(self) -> ServiceStatus:
        """The state now, read from any thread."""
        scheduler, busy_since = self._engine.scheduler, self._busy_since
        return ServiceStatus(
            running=len(scheduler.running),
            waiting=scheduler.num_waiting,
            free_blocks=scheduler.pool.num_free_blocks,
            num_blocks=scheduler.pool.num_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self._num_steps,
            step_seconds=self._step_seconds,
            num_sampled=self._num_sampled,
            seconds_since_heartbeat=0.0 if busy_since is None else time.monotonic() - busy_since,
            failure=self.failure,
        )

    async def submit(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        tenant: str = "",
        priority: int = 0,
        cache_salt: str = "",
        grammar: GrammarFactory | None = None,
        max_wait: float = math.inf,
    ) -> Generation:
        """Queue a request; the other arguments are those of `Engine.submit`. max_wait: seconds after which it is given
        up if it has not started.

        Raises RequestError if the request can never be served, Overloaded if the queue is full, EngineStopped.
        """
        prompt = check_request(prompt_token_ids, sampling, self.max_model_len, self._engine.vocab_size)
        generation, deadline = Generation(self, sampling.n), time.monotonic() + max_wait

        def start() -> None:
            if self._is_closing:
                raise self._stopped_error()
            request = generation.request = self._engine.submit(prompt, sampling, priority, cache_salt, grammar, tenant)
            self._live[request], self._start_deadlines[request] = generation, deadline

        try:
            await self.call(start)
        except asyncio.CancelledError:
            generation.abort()
            raise
        return generation

    async def load_weights(self, model: Transformer, version: int, running: WhileRunning = "drain") -> None:
        """Change the weights; see `Engine.load_weights`. running="drain" finishes running requests first, while others
        wait."""
        if running != "drain":
            await self.call(lambda: self._load(model, version, running))
            return
        drained, loop = asyncio.Event(), asyncio.get_running_loop()
        try:
            await self.call(lambda: self._drain(lambda: loop.call_soon_threadsafe(drained.set)))
            await drained.wait()
            await self.call(lambda: self._load(model, version, "keep"))  # nothing runs
        finally:
            self.post(lambda: setattr(self._engine.scheduler, "is_draining", False))

    async def close(self, max_wait: float = 0.0) -> None:
        """Refuse new requests, finish the others within `max_wait` seconds, abort the rest, and end the thread."""
        self._is_closing, deadline = True, time.monotonic() + max_wait
        while self._live and time.monotonic() < deadline and self.failure is None:
            await asyncio.sleep(0.02)
        self.post(self._stop)
        await asyncio.to_thread(self._thread.join)

    def post(self, command: Callable[[], None]) -> None:
        """Execute `command` on the engine's thread before its next step."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    async def call(self, command: Callable[[], None]) -> None:
        """`post`, then wait for the end of the command. Raises what the command raises, EngineStopped if the engine
        stopped."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def end(error: Exception | None) -> None:
            if not done.done():  # the caller still waits
                done.set_result(None) if error is None else done.set_exception(error)

        def run() -> None:
            found = None
            if done.cancelled():
                return
            try:
                command()
            except Exception as error:
                found = error
            self._outbox.setdefault(loop, []).append((end, found))

        with self._wake:
            if self._is_stopped:
                raise self._stopped_error()
            self._commands.append(run)
            self._wake.notify()
        await done

    # The methods below run on the engine's thread.

    def abort_now(self, generation: Generation) -> None:
        """Abort a generation."""
        if generation.request in self._live:
            self._engine.abort(generation.request)
            self._publish_ends(generation)

    def end_now(self, generation: Generation, index: int) -> None:
        """End one completion of a generation."""
        if generation.request in self._live:
            self._engine.end(generation.request, index)
            self._publish_ends(generation)

    def end_thinking_now(self, generation: Generation) -> None:
        """Close the thinking of a generation."""
        if generation.request in self._live:
            self._engine.end_thinking(generation.request)

    def _run(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)  # a new thread has what any other thread has set last
        try:
            while not self._is_stopped:
                for command in self._next_commands():
                    command()
                self._give_up_waiting()
                self._deliver()  # whoever waits for a command does not wait for the step
                if self._has_work and not self._is_stopped:
                    self._step()
                elif self._after_drain:
                    self._end_drain()
                self._deliver()
        except BaseException as error:
            log.exception("the engine stopped")
            self.failure = f"the engine failed: {type(error).__name__}: {error}"
            self._stop()
            self._deliver()

    @property
    def _has_work(self) -> bool:
        scheduler = self._engine.scheduler
        return bool(scheduler.running or (scheduler.num_waiting and not scheduler.is_draining))

    def _next_commands(self) -> list[Callable[[], None]]:
        """The commands so far; waits for one if there is nothing else to do."""
        with self._wake:
            self._busy_since = None
            while not (self._commands or self._has_work or self._after_drain):
                self._wake.wait()
            self._busy_since = time.monotonic()
            commands, self._commands = self._commands, []
        return commands

    def _step(self) -> None:
        began = time.monotonic()
        try:
            output = self._engine.step()
        except Exception as error:
            self._num_failed_steps += 1
            if self._num_failed_steps == MAX_FAILED_STEPS:
                raise
            log.exception("a step failed; its requests end with an error")
            for request, generation in list(self._live.items()):
                if request.is_started:
                    request.error = f"the engine failed: {type(error).__name__}: {error}"
                    self._engine.abort(request, "error")
                    self._publish_ends(generation)
            return
        self._num_failed_steps = 0
        self._num_steps += 1
        self._step_seconds += time.monotonic() - began
        self._num_sampled += len(output.token_ids)
        for update in output.updates():
            self._publish(self._live[update.request], update)

    def _publish(self, generation: Generation, update: CompletionUpdate) -> None:
        generation.unsent.append(update)
        is_end, now = update.finish_reason is not None, self._busy_since or 0.0
        if is_end or now - generation.sent_at >= generation.min_seconds:
            self._send(generation, now)
        if is_end:
            generation.open.discard(update.index)
            if not generation.open:
                self._forget(update.request)

    def _publish_ends(self, generation: Generation) -> None:
        """Publish the ends of completions that did not end in a step."""
        request = generation.request
        assert request is not None
        for index in sorted(generation.open):
            completion = request.completions[index]
            if completion is not None:
                self._publish(generation, CompletionUpdate(request, index, (), (), (), completion.finish_reason))

    def _forget(self, request: Request) -> None:
        del self._live[request]
        self._start_deadlines.pop(request, None)

    def _give_up_waiting(self) -> None:
        """Give up requests that waited too long."""
        now = time.monotonic()
        for request, deadline in list(self._start_deadlines.items()):
            if request.is_started:
                del self._start_deadlines[request]
            elif now > deadline:
                self._engine.abort(request)
                self._fail(request, Overloaded("the request waited too long for its turn; retry later"))

    def _stopped_error(self) -> EngineStopped:
        return EngineStopped(self.failure or "the server is shutting down")

    def _fail(self, request: Request, error: Exception) -> None:
        generation = self._live[request]
        self._send(generation, -math.inf)  # what was sampled before
        self._outbox[generation.loop].append((generation.receive, error))
        self._forget(request)

    def _send(self, generation: Generation, now: float) -> None:
        """Put the updates of a generation into the outbox."""
        self._outbox.setdefault(generation.loop, []).append((generation.receive, generation.unsent))
        generation.unsent, generation.sent_at = [], now

    def _deliver(self) -> None:
        """Hand the outbox to the event loops."""
        outbox, self._outbox = self._outbox, {}
        for loop, calls in outbox.items():
            try:
                loop.call_soon_threadsafe(_call_all, calls)
            except RuntimeError:  # the loop is closed
                for generation in [each for each in self._live.values() if each.loop is loop]:
                    self.abort_now(generation)

    def _drain(self, then: Callable[[], Any]) -> None:
        """Call `then` when no completion runs; until then no other one starts."""
        self._engine.scheduler.is_draining = True
        self._after_drain.append(then)

    def _end_drain(self) -> None:
        ready, self._after_drain = self._after_drain, []
        for then in ready:
            then()

    def _load(self, model: Transformer, version: int, running: WhileRunning) -> None:
        self._engine.load_weights(model, version, running)
        for generation in list(self._live.values()):
            self._publish_ends(generation)

    def _stop(self) -> None:
        """Fail all requests and end the thread."""
        with self._wake:
            self._is_closing = self._is_stopped = True
            commands, self._commands = self._commands, []
        for request in list(self._live):
            self._fail(request, self._stopped_error())
        for command in commands:
            command()


def _call_all(calls: list[tuple[Callable[[Any], None], Any]]) -> None:
    for function, argument in calls:
        function(argument)
