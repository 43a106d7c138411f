"""What the routes of the page share: the caller of a request, its protection, and the page's own files."""

import asyncio
import gzip
import hashlib
import hmac
import mimetypes
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fastapi import APIRouter, Request, Response

from thinkstack.server.errors import AuthenticationError
from thinkstack.server.keys import Principal
from thinkstack.server.page.answers import Answers
from thinkstack.server.page.conversations import Conversations
from thinkstack.server.page.errors import Forbidden, NotFound
from thinkstack.server.page.sessions import IDLE_MS, Session, Sessions

if TYPE_CHECKING:
    from thinkstack.server.app import Server

COOKIE = "thinkstack_session"
LOCAL_CSRF = "local"
"""Without keys there is no session, and no secret: strangers cannot send the header, which no form can set."""
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CSP,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""Headers of all documents and files."""
NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
"""Headers of all data."""
SAFE = ("GET", "HEAD")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who sends a request of the page. session: None for the local user of a server without keys."""

    principal: Principal
    session: Session | None

    @property
    def user_id(self) -> int:
        """The user."""
        return self.principal.user_id

    @property
    def csrf(self) -> str:
        """The token that changes need."""
        return LOCAL_CSRF if self.session is None else self.session.csrf


class Page:
    """The page of one server."""

    def __init__(self, server: "Server"):
        self.server = server
        self.sessions = Sessions(server.accounts, server.settings.sign_up)
        self.conversations = Conversations(server.accounts)
        self.answers = Answers(server, self.conversations, server.settings.unread_seconds)

    async def caller(self, request: Request) -> Caller:
        """Who sends a request. Raises AuthenticationError, and Forbidden for a change that another site sends."""
        if self.server.local_principal is not None:
            caller = Caller(principal=self.server.local_principal, session=None)
        else:
            token = request.cookies.get(COOKIE, "")
            if not token:
                raise AuthenticationError("you are signed out; sign in again")
            session = await asyncio.to_thread(self.sessions.find, token)
            caller = Caller(principal=session.principal, session=session)
        if request.method not in SAFE:
            check_origin(request)
            if not hmac.compare_digest(request.headers.get("x-csrf-token", "").encode(), caller.csrf.encode()):
                raise Forbidden("the request does not come from this page; load the page again")
        request.state.principal = caller.principal
        return caller

    async def session(self, request: Request) -> Session:
        """The session of a request. Raises AuthenticationError, Forbidden; also for the local user, who has none."""
        found = (await self.caller(request)).session
        if found is None:
            raise Forbidden("a server without keys has one local user, without a session and a password")
        return found


def check_origin(request: Request) -> None:
    """Raise Forbidden for a request that another site has made a browser send."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site", "same-origin")
    is_foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    if is_foreign or site not in ("same-origin", "none"):
        raise Forbidden("the request comes from another site")


def set_session(request: Request, response: Response, token: str) -> None:
    """Send the cookie of a session; "" ends it."""
    response.set_cookie(
        COOKIE, token, max_age=IDLE_MS // 1000 if token else 0, path="/", httponly=True, samesite="lax",
        secure=request.url.scheme == "https",
    )  # fmt: skip


def file_routes() -> APIRouter:
    """The page's own files; the browser asks each time whether they have changed."""
    routes = APIRouter(include_in_schema=False)
    folder = resources.files("thinkstack.server").joinpath("ui")
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    small = {name: gzip.compress(data, mtime=0) for name, data in files.items()}
    tags = {name: hashlib.sha256(data).hexdigest()[:20] for name, data in files.items()}

    def reply(request: Request, name: str) -> Response:
        if name not in files:
            raise NotFound(f"the page has no file {name!r}")
        is_small = "gzip" in request.headers.get("accept-encoding", "")
        tag = f'"{tags[name]}{"-gzip" if is_small else ""}"'
        headers = HEADERS | {"Cache-Control": "no-cache", "ETag": tag, "Vary": "Accept-Encoding"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        if is_small:
            headers["Content-Encoding"] = "gzip"
        media_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return Response((small if is_small else files)[name], media_type=media_type, headers=headers)

    @routes.get("/")
    async def index(request: Request) -> Response:
        """The page."""
        return reply(request, "index.html")

    @routes.get("/ui/{name}")
    async def file(name: str, request: Request) -> Response:
        """A script or style of the page."""
        return reply(request, name)

    return routes
