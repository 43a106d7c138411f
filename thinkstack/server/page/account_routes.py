"""Routes of the page for its users: signing in, keys and usage."""

import asyncio
import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from thinkstack.server.accounts import PAGE_KEY
from thinkstack.server.errors import AuthenticationError
from thinkstack.server.limits import DAY_MS
from thinkstack.server.page.errors import Forbidden, NotFound, WrongPassword
from thinkstack.server.page.fields import Body, Name, Secret, Text
from thinkstack.server.page.page import COOKIE, NO_STORE, Caller, Page, check_origin, set_session
from thinkstack.server.page.sessions import Session
from thinkstack.server.prices import format_amount
from thinkstack.server.served import ServedModel
from thinkstack.types import RequestError

USAGE_DAYS = 30
MAX_EXPIRY_DAYS = 3650


class SignIn(Body):
    """Who signs in."""

    name: Name
    password: Secret


class SignUp(SignIn):
    """Who makes an account."""

    invitation: Secret = ""


class Password(Body):
    """A change of the password."""

    old: Secret = ""
    new: Secret


class NewKey(Body):
    """A key to make."""

    name: Annotated[Text, Field(max_length=64)] = ""
    expires_days: Annotated[int, Field(ge=1, le=MAX_EXPIRY_DAYS)] | None = None


def account_routes(page: Page) -> APIRouter:
    """Signing in."""
    routes = APIRouter(prefix="/page", include_in_schema=False)
    sessions = page.sessions

    @routes.get("/me")
    async def me(request: Request) -> JSONResponse:
        """The caller, and what it may use."""
        try:
            caller = await page.caller(request)
        except AuthenticationError as error:
            body = {"error": {"code": "signed_out", "message": str(error)}, "sign_up": sessions.mode}
            return JSONResponse(body, 401, headers=NO_STORE)
        return JSONResponse(await _describe_caller(page, caller), headers=NO_STORE)

    @routes.post("/sign-in")
    async def sign_in(body: SignIn, request: Request) -> Response:
        """Start a session."""
        check_origin(request)
        old = request.cookies.get(COOKIE, "")
        try:
            token = await asyncio.to_thread(sessions.sign_in, body.name, body.password, *_source(request), old)
        except AuthenticationError as error:
            raise WrongPassword("wrong user name or password") from error
        return _signed_in(request, token)

    @routes.post("/sign-up")
    async def sign_up(body: SignUp, request: Request) -> Response:
        """Make an account and start a session."""
        check_origin(request)
        token = await asyncio.to_thread(sessions.sign_up, body.name, body.password, body.invitation, *_source(request))
        return _signed_in(request, token)

    return routes


def session_routes(page: Page) -> APIRouter:
    """Sessions, passwords and invitations."""
    routes = APIRouter(prefix="/page", include_in_schema=False)
    sessions = page.sessions
    signed_in = Annotated[Caller, Depends(page.caller)]
    in_session = Annotated[Session, Depends(page.session)]

    @routes.post("/sign-out")
    async def sign_out(session: in_session, request: Request) -> Response:
        """End the session."""
        await asyncio.to_thread(sessions.end, session.principal.user_id, session.id)
        return _signed_in(request, "")

    @routes.post("/password")
    async def password(body: Password, session: in_session) -> dict[str, Any]:
        """Change the password; all other sessions end."""
        try:
            await asyncio.to_thread(sessions.change_password, session, body.old, body.new)
        except AuthenticationError as error:
            raise WrongPassword("the present password is wrong") from error
        return {}

    @routes.get("/sessions")
    async def list_sessions(session: in_session) -> dict[str, Any]:
        """All sessions of the user."""
        rows = await asyncio.to_thread(sessions.list_sessions, session.principal.user_id)
        return {"sessions": [row | {"is_this": row["id"] == session.id} for row in rows]}

    @routes.delete("/sessions/{session_id}")
    async def end_session(session_id: int, session: in_session) -> dict[str, Any]:
        """End a session of the user."""
        await asyncio.to_thread(sessions.end, session.principal.user_id, session_id)
        return {}

    @routes.post("/invitations")
    async def invite(caller: signed_in) -> dict[str, Any]:
        """An invitation for a new user."""
        if not caller.principal.is_admin:
            raise Forbidden("invitations are for administrators")
        return {"invitation": await asyncio.to_thread(sessions.invite, caller.user_id)}

    return routes


def key_routes(page: Page) -> APIRouter:
    """Keys and usage."""
    routes = APIRouter(prefix="/page", include_in_schema=False)
    accounts = page.server.accounts
    signed_in = Annotated[Caller, Depends(page.caller)]

    @routes.get("/keys")
    async def list_keys(caller: signed_in) -> dict[str, Any]:
        """The keys of the user."""
        now_ms = int(accounts.clock() * 1000)
        names = ("id", "prefix", "name", "created_ms", "expires_ms", "last_used_ms")
        rows = [row for row in await asyncio.to_thread(accounts.list_keys) if _is_own(row, caller)]
        return {
            "keys": [
                {name: row[name] for name in names}
                | {"is_active": row["revoked_ms"] is None and (row["expires_ms"] or now_ms + 1) > now_ms}
                for row in rows
            ]
        }

    @routes.post("/keys")
    async def new_key(body: NewKey, caller: signed_in) -> dict[str, Any]:
        """Make a key, which is shown once."""
        if body.name == PAGE_KEY:
            raise RequestError(f"the name {PAGE_KEY!r} is taken; choose another one", "name")
        seconds = None if body.expires_days is None else body.expires_days * DAY_MS // 1000
        key = await asyncio.to_thread(accounts.add_key, caller.user_id, body.name, ("chat",), (), seconds)
        return {"key": key}

    @routes.delete("/keys/{key_id}")
    async def revoke_key(key_id: int, caller: signed_in) -> dict[str, Any]:
        """Revoke a key of the user."""
        rows = await asyncio.to_thread(accounts.list_keys)
        found = next((row for row in rows if row["id"] == key_id and _is_own(row, caller)), None)
        if found is None:
            raise NotFound("there is no such key")
        await asyncio.to_thread(accounts.revoke_key, found["prefix"])
        return {}

    @routes.get("/usage")
    async def usage(caller: signed_in) -> dict[str, Any]:
        """The usage of the last days."""
        since = datetime.datetime.now(datetime.UTC).date() - datetime.timedelta(days=USAGE_DAYS)
        rows = await asyncio.to_thread(accounts.usage, "day", caller.user_id, since)
        is_free = accounts.prices is None
        days = [
            {
                "day": row.group,
                "requests": row.requests,
                "prompt_tokens": row.usage.prompt_cache_hit_tokens + row.usage.prompt_cache_miss_tokens,
                "completion_tokens": row.usage.completion_tokens,
                "cost": None if is_free else format_amount(row.cost_pico),
            }
            for row in reversed(rows)
        ]
        return {"currency": None if is_free else accounts.currency, "days": days}

    return routes


def _source(request: Request) -> tuple[str, str]:
    """Address and browser of a request."""
    return request.client.host if request.client else "", request.headers.get("user-agent", "")


def _signed_in(request: Request, token: str) -> Response:
    response = JSONResponse({}, headers=NO_STORE)
    set_session(request, response, token)
    return response


def _is_own(row: Any, caller: Caller) -> bool:
    return bool(row["user_id"] == caller.user_id and row["name"] != PAGE_KEY)


async def _describe_caller(page: Page, caller: Caller) -> dict[str, Any]:
    server, principal = page.server, caller.principal
    accounts, limit = server.accounts, principal.limits.deep_think_per_day
    deep_think = None
    if limit:
        used = await asyncio.to_thread(accounts.deep_think_used, caller.user_id)
        resets_ms = (int(accounts.clock() * 1000) // DAY_MS + 1) * DAY_MS
        deep_think = {"limit": limit, "used": used, "resets_ms": resets_ms}
    balance = None
    if accounts.prices is not None:
        balance = format_amount((await asyncio.to_thread(accounts.balance, caller.user_id)).total_pico)
    return {
        "user": principal.user_name,
        "is_admin": principal.is_admin,
        "is_local": caller.session is None,
        "has_password": caller.session is not None and caller.session.has_password,
        "csrf": caller.csrf,
        "models": [_describe_model(model) for model in server.models if _is_offered(model, caller)],
        "deep_think": deep_think,
        "balance": balance,
        "currency": accounts.currency if balance is not None else None,
        "sign_up": page.sessions.mode,
    }


def _is_offered(model: ServedModel, caller: Caller) -> bool:
    return model.config.on_page and (not caller.principal.models or model.name in caller.principal.models)


def _describe_model(model: ServedModel) -> dict[str, Any]:
    modes = [thinking for thinking in (False, True) if model.member.can_start(thinking)] or [False]
    thinking = model.config.thinking if model.config.thinking in modes else modes[0]
    return {"name": model.name, "thinking": thinking, "modes": modes}
