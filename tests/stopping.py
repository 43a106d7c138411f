"""Requests to stop that need no signal."""

from collections.abc import Callable

from thinkstack.stopping import StopRequest


class StopWhen(StopRequest):
    """Requested as soon as `condition` holds."""

    def __init__(self, condition: Callable[[], bool]):
        super().__init__()
        self.condition = condition

    @property
    def is_requested(self) -> bool:
        return self.condition()
