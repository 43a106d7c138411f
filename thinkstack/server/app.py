"""The HTTP application: keys, turns, and the routes of DeepSeek's dialect."""

import asyncio
import contextlib
import functools
import logging
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

import thinkstack
from thinkstack.engine.interface import Overloaded
from thinkstack.server.accounts import Accounts
from thinkstack.server.anthropic import anthropic_routes
from thinkstack.server.api_errors import ApiError, found_error
from thinkstack.server.billing import Billing
from thinkstack.server.completions import completion_routes
from thinkstack.server.deepseek import ChatReply
from thinkstack.server.errors import (
    AuthenticationError,
    DatabaseUnavailable,
    InsufficientBalance,
    PermissionDenied,
    RateLimited,
)
from thinkstack.server.keys import Principal
from thinkstack.server.metrics import Metrics
from thinkstack.server.middleware import CheckHost, LimitBody, ObserveRequests
from thinkstack.server.ollama import ollama_routes
from thinkstack.server.openapi import ChatCompletion, OpenAIError, errors, reply
from thinkstack.server.operations import admin_routes, operation_routes
from thinkstack.server.page.errors import PageError
from thinkstack.server.page.page import Page
from thinkstack.server.page.routes import add_page
from thinkstack.server.prices import format_amount
from thinkstack.server.replies import UNBUFFERED, Reply, TurnResponse, WholeResponse
from thinkstack.server.responses import responses_routes
from thinkstack.server.schema import ChatRequest, TurnRequest
from thinkstack.server.served import ServedModels
from thinkstack.server.settings import ServerSettings
from thinkstack.server.strict_tools import check_strict_tools
from thinkstack.server.turns import Turn, make_turn
from thinkstack.types import RequestError

log = logging.getLogger(__name__)
WHOLE_INTERVAL = 1.0
"""Seconds between two readings of the tokens of a whole reply, which note what was delivered."""


class Server:
    """What the routes share."""

    def __init__(
        self,
        models: ServedModels,
        accounts: Accounts,
        settings: ServerSettings = ServerSettings(),
        principal: Principal | None = None,
    ):
        """principal: who sends all requests of a server without keys; None: requests need a key."""
        self.models, self.accounts, self.settings = models, accounts, settings
        self.billing = Billing(accounts)
        self.metrics = Metrics(models.members)
        self.started = int(time.time())
        self.local_principal, self.needs_keys = principal, principal is None
        self.turns: dict[str, Turn] = {}
        """Running requests by id."""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run until SIGTERM; then finish running requests, settle them, and stop the engines."""
        async with self.billing.running():
            keeper = asyncio.create_task(self._keep_alive())
            yield
            keeper.cancel()
            await self.drain()

    async def drain(self) -> None:
        """Finish running requests within drain_seconds and stop the engines; new requests are refused."""
        services = (member.service for member in self.models.members.values())
        await asyncio.gather(*(service.close(self.settings.drain_seconds) for service in services))

    async def principal(self, request: Request) -> Principal:
        """Who sends a request. Raises AuthenticationError."""
        found = self.local_principal or await self._principal_of_key(request)
        request.state.principal = found
        return found

    async def admin(self, request: Request) -> Principal:
        """Who sends a request to an admin route, which needs a key on every server. Raises AuthenticationError,
        PermissionDenied."""
        found = request.state.principal = await self._principal_of_key(request)
        found.check_scope("admin")
        return found

    async def _principal_of_key(self, request: Request) -> Principal:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = key.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        if not key:
            raise AuthenticationError("the request has no API key; send the header 'Authorization: Bearer sk-...'")
        found = self.accounts.recent_principal(key)
        return found if found is not None else await self.billing.call(self.accounts.authenticate, key)

    async def make_turn(self, principal: Principal, wanted: TurnRequest, id_prefix: str = "chatcmpl-") -> Turn:
        """Prepare a request. Raises RequestError, PermissionDenied."""
        principal.check_scope("chat")
        principal.check_model(wanted.model)
        return await make_turn(self.models.get(wanted.model), wanted, self.billing, id_prefix)

    async def answer(
        self,
        request: Request,
        reply: Reply,
        principal: Principal,
        is_stream: bool,
        ignored: Sequence[str] = (),
        media_type: str = "text/event-stream",
        turns: Sequence[Turn] = (),
    ) -> Response:
        """Start the turn of a reply and send it. media_type: that of a stream. turns: those of a reply with several, of
        which all start or none."""
        turns, headers = turns or (reply.turn,), {"X-Request-Id": reply.turn.id}
        request.state.turns = turns
        reads_often = is_stream or reply.turn.request.stop  # tokens after a stop string are sampled in vain
        for turn in turns:
            turn.min_seconds = self.settings.stream_interval if reads_often else WHOLE_INTERVAL
        if ignored := [*ignored, *reply.turn.prepared.ignored]:
            headers["X-Ignored-Fields"] = ", ".join(sorted(ignored))
        await self._start(turns, principal)
        self.turns |= {turn.id: turn for turn in turns}
        close = functools.partial(self._close, turns)
        if is_stream:
            return TurnResponse(self._stream(reply), close, media_type=media_type, headers=headers | UNBUFFERED)
        return WholeResponse(request, reply, close, self.settings.keep_alive_seconds, headers)

    async def _start(self, turns: Sequence[Turn], principal: Principal) -> None:
        """Start all turns, or none."""
        if len(turns) == 1:
            await turns[0].start(principal, self.settings.max_wait)
            return
        starts = (turn.start(principal, self.settings.max_wait) for turn in turns)
        try:
            for error in await asyncio.gather(*starts, return_exceptions=True):
                if error is not None:
                    raise error
        except BaseException:
            for turn in turns:
                turn.close()
            raise

    def _close(self, turns: Sequence[Turn]) -> None:
        for turn in turns:
            turn.close()
            del self.turns[turn.id]

    async def _stream(self, reply: Reply) -> AsyncIterator[bytes]:
        """The chunks of a reply; an error after the start is the last one."""
        chunks = reply.chunks()
        try:
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            yield reply.error(found_error(error, "a stream failed"))
        finally:
            await chunks.aclose()

    async def _keep_alive(self) -> None:
        """Make silent streams send a comment."""
        settings = self.settings
        while True:
            await asyncio.sleep(settings.keep_alive_seconds / 4)
            for turn in list(self.turns.values()):
                turn.keep_alive(settings.keep_alive_seconds, settings.max_step_seconds)


def create_app(server: Server) -> FastAPI:
    """The application with all routes."""
    page = Page(server) if server.settings.page else None

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with server.running(), contextlib.nullcontext() if page is None else page.answers.running():
            yield

    app = FastAPI(title="thinkstack", version=thinkstack.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    for prefix in ("", "/v1", "/beta"):
        app.include_router(chat_routes(server, is_beta=prefix == "/beta"), prefix=prefix)
        app.include_router(completion_routes(server), prefix=prefix)
        app.include_router(responses_routes(server), prefix=prefix)
    app.include_router(anthropic_routes(server))
    app.include_router(ollama_routes(server))
    app.include_router(operation_routes(server))
    app.include_router(admin_routes(server))
    if page is not None:
        add_page(app, page)
    for kind in ERRORS:
        app.add_exception_handler(kind, _error_reply)
    settings = server.settings
    app.add_middleware(LimitBody, max_bytes=settings.max_body_bytes, seconds=settings.body_seconds)
    if not server.needs_keys:
        app.add_middleware(CheckHost)
    app.add_middleware(ObserveRequests, count=server.metrics.count_request)
    return app


def chat_routes(server: Server, is_beta: bool = False) -> APIRouter:
    """Chat, models and balance in DeepSeek's dialect. is_beta: strict tools have DeepSeek's rules."""
    routes = APIRouter(responses=errors(OpenAIError))
    caller = Annotated[Principal, Depends(server.principal)]

    @routes.post("/chat/completions", responses=reply(ChatCompletion))
    async def chat_completions(body: ChatRequest, request: Request, principal: caller) -> Response:
        """Answer a conversation."""
        ignored, wanted = body.ignored_fields(), body.turn()
        if is_beta:
            check_strict_tools(wanted.tools)
        turn = await server.make_turn(principal, wanted)
        options = body.stream_options
        reply = ChatReply(turn, body.model, include_usage=options is not None and options.include_usage)
        return await server.answer(request, reply, principal, bool(body.stream), ignored)

    @routes.get("/models")
    async def models(principal: caller) -> dict[str, Any]:
        """The model names of this server."""
        rows = [
            {"id": model.name, "object": "model", "created": server.started, "owned_by": "thinkstack"}
            for model in server.models
            if not principal.models or model.name in principal.models
        ]
        return {"object": "list", "data": rows}

    @routes.get("/user/balance")
    async def balance(principal: caller) -> dict[str, Any]:
        """The balance of the caller."""
        found = await server.billing.call(server.accounts.balance, principal.user_id)
        amounts = {
            "total_balance": found.total_pico,
            "granted_balance": found.granted_pico,
            "topped_up_balance": found.topped_up_pico,
        }
        row = {"currency": found.currency} | {name: format_amount(amount) for name, amount in amounts.items()}
        return {"is_available": found.is_available, "balance_infos": [row]}

    @routes.post("/requests/{request_id}/answer-now")
    async def answer_now(request_id: str, principal: caller) -> dict[str, Any]:
        """Close the thinking of a running request, so that the answer begins."""
        turn = server.turns.get(request_id)
        if turn is None or turn.principal is None or turn.principal.user_id != principal.user_id:
            raise HTTPException(404, f"no request {request_id!r} is running")
        await turn.end_thinking()
        return {"id": request_id, "object": "request"}

    return routes


ERRORS = (
    RequestError, AuthenticationError, PermissionDenied, InsufficientBalance, RateLimited, DatabaseUnavailable,
    Overloaded, PageError, RequestValidationError, HTTPException, Exception,
)  # fmt: skip
"""What becomes a reply in the dialect's shape."""


async def _error_reply(request: Request, error: Exception) -> Response:
    if isinstance(error, PageError):
        return JSONResponse(error.body(), error.status)
    if isinstance(error, RequestValidationError):
        found = _validation_error(error)
    elif isinstance(error, HTTPException):
        words = str(error.detail)
        if error.status_code in (404, 405) and words == HTTPException(error.status_code).detail:  # no route
            words = f"there is no route {request.method} {request.url.path}; /openapi.json lists all routes"
        found = ApiError(error.status_code, words, "invalid_request_error")
        return JSONResponse(found.body(request.url.path), found.status, headers=error.headers)
    else:
        found = found_error(error, "a request failed")
    return JSONResponse(found.body(request.url.path), found.status, headers=found.headers)


def _validation_error(error: RequestValidationError) -> ApiError:
    """The first field that does not fit; broken JSON is a 400, an invalid value a 422."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['ctx']['error']}", "invalid_request_error")
    if first["loc"] == ("body",):
        return ApiError(
            400, "the body is not a JSON object, or its Content-Type is not application/json", "invalid_request_error"
        )
    same = [each for each in error.errors() if each["loc"][:2] == first["loc"][:2]]  # of all kinds the field may have
    found = next((each for each in same if not each["type"].endswith("_type")), first)
    field = ".".join(str(part) for part in found["loc"][1:] if isinstance(part, int) or part.isidentifier())
    field = re.sub(r"\.(str|bool|int|list|[A-Z]\w*)\b", "", field)
    return ApiError(422, f"{field}: {found['msg']}", "invalid_request_error", field)
