"""Worker processes for verifiers that may hang or crash.

A worker is a process that runs one call at a time. The timeout of a call starts when its worker reports that the call
has started, so neither the queue nor the start of the process counts.
"""

import contextlib
import math
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from thinkstack.machine import usable_cores
from thinkstack.types import ConfigError, Score

START_SECONDS = 60.0
"""A worker that has not started its call after this time is replaced; generous, since imports are slow on a busy
machine."""
MAX_WORKERS = 8
"""Default maximum number of workers."""
MAX_STARTS = 3
"""Maximum attempts to start a call; if none succeeds, the set-up is at fault, and `run` raises RuntimeError."""

TIMEOUT_SECONDS = 10.0
"""Default longest run time of one call."""

VerifierFunction = Callable[..., Score]
"""A picklable function that a new process can import by name, or a method of a picklable object."""


@dataclass
class _Worker:
    """A process and its current call, if any."""

    process: BaseProcess
    pipe: Connection
    call_index: int = -1
    """Index of the call; -1 when idle."""
    has_started: bool = False
    deadline: float = 0.0
    """Monotonic second after which the worker is killed."""


class VerifierPool:
    """A fixed number of workers, each idle or running exactly one call; lost workers are replaced when needed."""

    def __init__(self, num_workers: int = 0, timeout_seconds: float = TIMEOUT_SECONDS):
        """num_workers: 0 means as many as this process has cores, at most MAX_WORKERS; they start when they are needed.
        timeout_seconds: longest run time of one call."""
        num_workers = num_workers or min(usable_cores(), MAX_WORKERS)
        if num_workers < 1:
            raise ConfigError(f"num_workers={num_workers} must not be negative; 0 uses all cores, up to {MAX_WORKERS}")
        if not timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds={timeout_seconds} must be positive")
        self.num_workers, self.timeout_seconds = num_workers, timeout_seconds
        self._workers: list[_Worker] = []

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill all workers. A later `run` starts new ones."""
        while self._workers:
            self._discard(self._workers[0])

    def run(
        self,
        function: VerifierFunction,
        arguments: Sequence[tuple[Any, ...]],
        prepare: Callable[[], object] | None = None,
        timeouts: Sequence[float | None] | None = None,
    ) -> list[Score]:
        """Return `function(*arguments[i])` for every i, in that order.

        A call that raises, crashes its process, times out or returns anything but a finite Score gives an unscorable
        Score with the reason; other calls are not affected. prepare: called before the time of a call starts, for
        imports. timeouts: longest run time of each call in seconds; None: the pool's. Raises RuntimeError if a call
        cannot be started in MAX_STARTS processes.
        """
        calls = [(function, values, prepare) for values in arguments]
        limits = [self.timeout_seconds if given is None else given for given in timeouts or [None] * len(calls)]
        scores: list[Score | None] = [None] * len(arguments)
        queue, starts = deque(range(len(arguments))), [0] * len(arguments)
        try:
            while queue or any(worker.call_index >= 0 for worker in self._workers):
                self._assign_calls(calls, queue, starts)
                for worker in self._wait_for_workers():
                    self._handle_worker(worker, scores, queue, starts, limits)
        finally:
            for worker in [worker for worker in self._workers if worker.call_index >= 0]:
                self._discard(worker)  # only after an exception: its result would be read as the result of a later call
        done = [score for score in scores if score is not None]
        assert len(done) == len(arguments), "every call has a score"
        return done

    def _assign_calls(self, calls: Sequence[tuple[Any, ...]], queue: deque[int], starts: list[int]) -> None:
        """Assign queued calls to idle workers; start workers up to num_workers."""
        while queue:
            worker = next((worker for worker in self._workers if worker.call_index < 0), None)
            if worker is None:
                if len(self._workers) == self.num_workers:
                    return
                worker = self._start()
            call_index = queue.popleft()
            starts[call_index] += 1
            worker.call_index, worker.has_started = call_index, False
            worker.deadline = time.monotonic() + START_SECONDS
            # a worker that died while idle has closed its end of the pipe, which _handle_worker detects
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                worker.pipe.send(calls[call_index])

    def _wait_for_workers(self) -> list[_Worker]:
        """Wait until a worker sends a message, dies or reaches its deadline; return all such workers."""
        busy = [worker for worker in self._workers if worker.call_index >= 0]
        pause = max(min(worker.deadline for worker in busy) - time.monotonic(), 0)
        ready = wait([worker.pipe for worker in busy], pause)
        now = time.monotonic()
        return [worker for worker in busy if worker.pipe in ready or now >= worker.deadline]

    def _handle_worker(
        self,
        worker: _Worker,
        scores: list[Score | None],
        queue: deque[int],
        starts: list[int],
        limits: Sequence[float],
    ) -> None:
        """Process a worker's message; discard the worker if it died or timed out."""
        call_index = worker.call_index
        try:
            kind, value = worker.pipe.recv() if worker.pipe.poll() else ("timeout", None)
        except (EOFError, ConnectionResetError):
            kind, value = "died", None
        if kind == "started":
            worker.has_started, worker.deadline = True, time.monotonic() + limits[call_index]
            return
        if kind == "done":
            scores[call_index], worker.call_index = value, -1
            return
        self._discard(worker)
        if worker.has_started:
            reason = f"ran longer than {limits[call_index]:g} s" if kind == "timeout" else "its process died"
            scores[call_index] = unscorable(reason)
        elif starts[call_index] < MAX_STARTS:
            queue.appendleft(call_index)
        else:
            raise RuntimeError(
                f"{MAX_STARTS} verifier processes died before the call started; is the function importable?"
            )

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")  # fork would copy the locks of torch's threads
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that the pipe closes when the process ends
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def _discard(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)


def unscorable(reason: str) -> Score:
    """Return the Score of an answer that could not be verified."""
    return Score(total=0.0, unscorable=reason)


def checked(found: object) -> Score:
    """Return what a verifier returned; unscorable unless it is a Score with a finite total."""
    if isinstance(found, Score) and isinstance(found.total, int | float) and math.isfinite(found.total):
        return found
    return unscorable(f"returned {found!r:.100}, not a finite score")


def _serve(pipe: Connection) -> None:
    """Run calls from the pipe until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process group; the parent ends its workers
    while True:
        try:
            function, arguments, prepare = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if prepare is not None:
                prepare()
            pipe.send(("started", None))
            score = checked(function(*arguments))
        except Exception as error:  # the boundary: whatever a verifier raises becomes the reason
            score = unscorable(f"{type(error).__name__}: {error}")
        pipe.send(("done", score))
