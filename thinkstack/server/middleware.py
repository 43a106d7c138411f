"""What happens to every request before its route: limits on the body, the Host header, metrics and the log."""

import asyncio
import ipaddress
import json
import logging
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from thinkstack.engine.interface import Overloaded
from thinkstack.server.api_errors import ApiError, api_error
from thinkstack.server.prices import Usage
from thinkstack.server.served import Member
from thinkstack.server.sse import to_json

log = logging.getLogger("thinkstack.requests")
TURNS = ("/completions", "/responses", "/messages", "/api/chat")
"""Ends of the paths that start a turn."""
CLOSE = {"Connection": "close"}
"""The rest of the request is not read, so the connection cannot be used again."""


class LimitBody:
    """Refuses bodies above a size, whether announced or not, and bodies that arrive too slowly."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float):
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        too_large = f"the body is above {self.max_bytes} bytes; shorten the request"
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self.max_bytes:
            error = ApiError(413, too_large, "invalid_request_error")
            await JSONResponse(error.body(scope["path"]), error.status, CLOSE)(scope, receive, send)
            return
        left, is_read, deadline = self.max_bytes, False, asyncio.get_running_loop().time() + self.seconds

        async def limited() -> Message:
            nonlocal left, is_read
            if is_read:
                return await receive()  # waits for the end of the connection
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                reason = f"the body did not arrive within {self.seconds:g} seconds"
                raise HTTPException(408, reason, CLOSE) from error
            is_read = not message.get("more_body", False)
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, too_large, CLOSE)
            return message

        await self.app(scope, limited, send)


class Overload:
    """Refuses turns before they are read while no model can take one: under an overload most requests end here."""

    def __init__(self, members: Mapping[str, Member], count: Callable[[str, int], None]):
        """count: function (route, status)."""
        self.members, self.count = members, count

    def refusal(self, path: str) -> bytes | None:
        """The whole reply to a request, or None if it goes on."""
        if not path.endswith(TURNS) or not all(member.is_full for member in self.members.values()):
            return None
        waiting = sum(member.service.status.waiting for member in self.members.values())
        error = api_error(Overloaded(f"{waiting:,} requests are waiting; retry later"))
        self.count(path, error.status)
        body = to_json(error.body(path))
        headers = error.headers | CLOSE | {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, "", ""]).encode() + body


class CheckHost:
    """Answers requests to names of this machine alone.

    A page of a stranger cannot read replies of another origin, but it can let its own name point to 127.0.0.1 (DNS
    rebinding); the Host header then has that name.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or has_local_host(scope):
            await self.app(scope, receive, send)
            return
        words = "this server has no keys and answers to names of this machine alone, such as localhost"
        await JSONResponse(ApiError(421, words, "invalid_request_error").body(scope["path"]), 421)(scope, receive, send)


def has_local_host(scope: Scope) -> bool:
    """Whether the Host header of a request names this machine."""
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
    name, colon, port = host.rpartition(":")
    return is_loopback((name if colon and port.isdecimal() else host).removeprefix("[").removesuffix("]"))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class ObserveRequests:
    """Counts requests by route and status, and logs each one: never a prompt, a completion or a whole key."""

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]):
        """count: function (route, status)."""
        self.app, self.count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # the client left before the reply began

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        scope.setdefault("state", {})
        try:
            await self.app(scope, receive, observed)
        except Exception:
            status = 500
            raise
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self.count(route, status)
            if log.isEnabledFor(logging.INFO):
                fields = request_fields(scope["state"]) | {"seconds": round(time.monotonic() - began, 6)}
                log.info("%s %s %d", scope["method"], route, status, extra={
                    "fields": {"method": scope["method"], "route": route, "status": status} | fields
                })  # fmt: skip


def request_fields(state: dict[str, Any]) -> dict[str, Any]:
    """What the log says about a request, as far as it got. state: `principal` and `turns` of the request."""
    principal, turns = state.get("principal"), state.get("turns")
    fields: dict[str, Any] = {}
    if principal is not None:
        fields |= {"user": principal.user_name, "key": principal.key_prefix}
    if turns:
        first, usage = turns[0], Usage.sum(turn.usage for turn in turns)
        fields |= {"id": first.id, "model": first.model.name, "finish": first.status, **vars(usage)}
        fields["first_token_seconds"] = first.first_token_seconds
    return fields


class JsonFormatter(logging.Formatter):
    """Log records as JSON, one a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record in one line."""
        row: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            row["exception"] = self.formatException(record.exc_info)
        return json.dumps(row | getattr(record, "fields", {}), ensure_ascii=False)
