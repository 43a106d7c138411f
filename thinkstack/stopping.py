"""Graceful stop: on Ctrl-C or SIGTERM the running stage saves its state before it ends."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from thinkstack.types import Interrupted

log = logging.getLogger(__name__)


class StopRequest:
    """A flag that requests a stop. A stage checks it after each step, or allows an interruption within a block."""

    def __init__(self) -> None:
        self._is_requested = self._may_interrupt = False

    @property
    def is_requested(self) -> bool:
        """Whether to save the state and raise Interrupted."""
        return self._is_requested

    def request(self, number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
        """Request a stop; used as a signal handler. Raises KeyboardInterrupt on the second request."""
        if self._is_requested:
            raise KeyboardInterrupt
        self._is_requested = True
        log.warning("saving the state, then stopping; press Ctrl-C again to stop at once")
        if self._may_interrupt:
            raise Interrupted

    @contextmanager
    def may_interrupt(self) -> Iterator[None]:
        """Within this block a request raises Interrupted immediately."""
        self._may_interrupt = True
        try:
            if self.is_requested:
                raise Interrupted
            yield
        finally:
            self._may_interrupt = False


@contextmanager
def stopping_on_signals() -> Iterator[StopRequest]:
    """A StopRequest for Ctrl-C and SIGTERM (which schedulers send before SIGKILL); only works in the main thread."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
