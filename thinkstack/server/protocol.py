"""HTTP/1.1 with limits on the head of a request, which uvicorn has not, and refusals at the cost of one write."""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 65_536


class LimitedProtocol(HttpToolsProtocol):
    """A connection that is closed if the head of a request is too large, or not complete in time.

    The time begins with the connection, and for later requests with their first byte; the silence between two requests
    has uvicorn's limit.
    """

    def __init__(self, *arguments: Any, header_seconds: float, refusal: Callable[[str], bytes | None], **named: Any):
        """refusal: function path -> the reply to a request that goes no further, or None."""
        super().__init__(*arguments, **named)
        self._refusal = refusal
        self._seconds, self._num_bytes = header_seconds, 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self._seconds, transport.close)

    def data_received(self, data: bytes) -> None:
        """Stop waiting if the head is complete, and begin to wait if it is not."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
            return
        self._num_bytes += len(data)
        if self._num_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The headers are above {MAX_HEAD_BYTES} bytes.")
        elif self._timer is None:
            self._timer = self.loop.call_later(self._seconds, self.transport.close)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        reply = self._refusal(cycle.scope["path"])
        if reply is None:
            super()._start_asgi_task(cycle, app)
            return
        cycle.response_complete = True  # what follows of the request is skipped
        self.transport.write(reply)
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        self._num_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
