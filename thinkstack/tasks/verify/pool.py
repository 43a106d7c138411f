"""Checkers that may hang or crash, run where they can be killed.

A worker is a process of its own that takes one call at a time. The clock of a call starts when its worker reports that
it begins, so neither the queue nor the start of a process counts against it.
"""

import contextlib
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from thinkstack.types import ConfigError, Score

START_SECONDS = 60.0
"""A worker that has not begun its call after this time is replaced; generous, for a crowded machine imports slowly."""
MAX_STARTS = 3
"""Workers a call may lose before it begins, by dying on import or never starting; then the fault lies in the set-up."""

Checker = Callable[..., Score]
"""A picklable function, importable by name in a fresh process."""


@dataclass
class _Worker:
    """A process and the call it is working on, if any."""

    process: BaseProcess
    pipe: Connection
    place: int = -1
    """Index of the call; -1 when idle."""
    has_begun: bool = False
    deadline: float = 0.0
    """Monotonic second after which the worker is killed."""


class CheckerPool:
    """A fixed number of workers, each idle or at work on exactly one call; lost ones are replaced when next needed."""

    def __init__(self, num_workers: int, timeout_seconds: float):
        """timeout_seconds: longest run of one call."""
        if num_workers < 1:
            raise ConfigError(f"num_workers={num_workers} checks nothing; use at least 1")
        if not timeout_seconds > 0:
            raise ConfigError(f"timeout_seconds={timeout_seconds} lets no checker finish; use a positive number")
        self.num_workers, self.timeout_seconds = num_workers, timeout_seconds
        self._workers: list[_Worker] = []

    def __enter__(self) -> "CheckerPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers. The pool may be used again and starts new ones then."""
        while self._workers:
            self._discard(self._workers[0])

    def run(self, function: Checker, arguments: Sequence[tuple[Any, ...]]) -> list[Score]:
        """`function(*arguments[i])` for every i, in that order.

        A call that raises, crashes its process or runs out of time gives an unscorable Score with the reason; the other
        calls are not affected.
        """
        scores: list[Score | None] = [None] * len(arguments)
        queue, starts = deque(range(len(arguments))), [0] * len(arguments)
        try:
            while queue or any(worker.place >= 0 for worker in self._workers):
                self._hand_out(function, arguments, queue, starts)
                for worker in self._until_news():
                    self._settle(worker, scores, queue, starts)
        finally:
            for worker in [worker for worker in self._workers if worker.place >= 0]:
                self._discard(worker)  # only after an exception: its answer would be taken for that of a later call
        done = [score for score in scores if score is not None]
        assert len(done) == len(arguments), "every call has a score"
        return done

    def _hand_out(
        self, function: Checker, arguments: Sequence[tuple[Any, ...]], queue: deque[int], starts: list[int]
    ) -> None:
        """Give waiting calls to idle workers, of which there are num_workers as long as calls wait."""
        while queue:
            worker = next((worker for worker in self._workers if worker.place < 0), None)
            if worker is None:
                if len(self._workers) == self.num_workers:
                    return
                worker = self._start()
            place = queue.popleft()
            starts[place] += 1
            worker.place, worker.has_begun = place, False
            worker.deadline = time.monotonic() + START_SECONDS
            # a worker that died while idle has closed its end of the pipe, which _settle sees
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                worker.pipe.send((function, arguments[place]))

    def _until_news(self) -> list[_Worker]:
        """Wait until a worker speaks, dies or reaches its deadline; returns those."""
        busy = [worker for worker in self._workers if worker.place >= 0]
        pause = max(min(worker.deadline for worker in busy) - time.monotonic(), 0)
        ready = wait([worker.pipe for worker in busy], pause)
        now = time.monotonic()
        return [worker for worker in busy if worker.pipe in ready or now >= worker.deadline]

    def _settle(self, worker: _Worker, scores: list[Score | None], queue: deque[int], starts: list[int]) -> None:
        """Take what a worker says; replace it if it says nothing more."""
        place = worker.place
        try:
            kind, value = worker.pipe.recv() if worker.pipe.poll() else ("late", None)
        except (EOFError, ConnectionResetError):
            kind, value = "gone", None
        if kind == "begun":
            worker.has_begun, worker.deadline = True, time.monotonic() + self.timeout_seconds
            return
        if kind == "done":
            scores[place], worker.place = value, -1
            return
        self._discard(worker)
        if worker.has_begun:
            reason = f"ran over {self.timeout_seconds:g} s" if kind == "late" else "its process died"
            scores[place] = unscorable(reason)
        elif starts[place] < MAX_STARTS:
            queue.appendleft(place)
        else:
            raise RuntimeError(f"{MAX_STARTS} checker processes ended before they began; is the checker importable?")

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")  # fork would copy the locks of torch's threads
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that the pipe ends when the process does
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def _discard(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        self._workers.remove(worker)


def unscorable(reason: str) -> Score:
    """The Score of an answer that no checker could judge."""
    return Score(total=0.0, unscorable=reason)


def _serve(pipe: Connection) -> None:
    """Answer calls until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; who started this ends it
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(("begun", None))
        try:
            score = function(*arguments)
        except Exception as error:  # the boundary: whatever a checker raises is a verdict on the checker
            score = unscorable(f"{type(error).__name__}: {error}")
        pipe.send(("done", score))
