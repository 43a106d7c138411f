"""Responses that send the reply to a turn, whole or as a stream, and end the turn if the client leaves."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from thinkstack.server.api_errors import ApiError, found_error
from thinkstack.server.sse import to_json
from thinkstack.server.turns import Turn

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers of replies that come in parts: caches do not store them, and proxies pass each part on at once."""


class Reply(Protocol):
    """The reply to a turn in one dialect."""

    turn: Turn

    async def whole(self) -> dict[str, Any]:
        """The whole reply."""

    def chunks(self) -> AsyncGenerator[bytes]:
        """The reply as a stream."""

    def error(self, error: ApiError) -> bytes:
        """An error after the start of a stream."""


class TurnResponse(StreamingResponse):
    """A stream that ends its turn even if the client leaves before the first chunk, when no iterator has begun."""

    def __init__(self, chunks: AsyncIterator[bytes], close: Callable[[], None], **options: Any):
        super().__init__(chunks, **options)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


class WholeResponse(Response):
    """A whole reply. If it takes long, blank lines come before it, which JSON permits; its status is 200 then, and a
    later failure is a body with an error."""

    def __init__(
        self, request: Request, reply: Reply, close: Callable[[], None], seconds: float, headers: dict[str, str]
    ):
        """close: ends the turn. seconds: time from one blank line to the next."""
        super().__init__()
        self._request, self._reply, self._close = request, reply, close
        self._seconds, self._sent_headers = seconds, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        lines: list[asyncio.Task[None]] = []
        loop, is_made = asyncio.get_running_loop(), asyncio.Event()

        def start() -> None:
            lines.append(loop.create_task(self._send_blank_lines(send, is_made)))

        timer = loop.call_later(self._seconds, start)
        try:
            body = await _unless_disconnected(self._request, self._reply.whole())
        except (ClientDisconnect, asyncio.CancelledError) as error:
            for task in lines:
                task.cancel()
            if isinstance(error, ClientDisconnect):
                return
            raise
        except Exception as error:
            if not lines:
                raise
            body = found_error(error, "a late reply failed").body(scope["path"])
        finally:
            timer.cancel()
            self._close()
        if not lines:
            await JSONResponse(body, headers=self._sent_headers)(scope, receive, send)
            return
        is_made.set()
        await lines[0]
        await send({"type": "http.response.body", "body": to_json(body)})

    async def _send_blank_lines(self, send: Send, is_made: asyncio.Event) -> None:
        headers = Headers(self._sent_headers | UNBUFFERED | {"Content-Type": "application/json"}).raw
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        while not is_made.is_set():
            await send({"type": "http.response.body", "body": b"\n", "more_body": True})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(is_made.wait(), self._seconds)


async def _unless_disconnected(request: Request, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled if the client leaves. Raises ClientDisconnect then."""
    task, is_working = asyncio.current_task(), True
    assert task is not None

    def leave(listener: "asyncio.Task[None]") -> None:
        if is_working and not listener.cancelled():
            task.cancel()

    listener = asyncio.ensure_future(_disconnected(request))
    listener.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if listener.done() and not task.uncancel():
            raise ClientDisconnect from None
        raise
    finally:
        is_working = False  # who leaves now does not cancel what comes after
        listener.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
