"""Who is signed in on the page: passwords, sessions and invitations.

A session is an opaque random token in a cookie that scripts cannot read; only its hash is stored, so it can be revoked
and a copy of the database signs nobody in. Each sign-in makes a new one. The token against forged requests (CSRF) is a
hash of the session's token, which the page reads once and sends with each change.
"""

import math
import secrets
import time
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import delete, insert, select, update

from thinkstack.server.accounts import Accounts
from thinkstack.server.database import users
from thinkstack.server.errors import AuthenticationError, PermissionDenied, RateLimited
from thinkstack.server.keys import Principal, hash_key
from thinkstack.server.page.tables import invitations, sessions
from thinkstack.types import ConfigError, RequestError

IDLE_MS = 30 * 86_400_000
"""A session that was not used for so long has ended."""
SEEN_MS = 60_000
"""Interval in which the last use of a session is written."""
INVITATION_MS = 7 * 86_400_000
MIN_PASSWORD, MAX_PASSWORD = 8, 1024
"""Number of characters."""
MAX_FAILURES, FAILURE_SECONDS = 10, 300.0
"""Failed sign-ins of one name or one address, and new accounts of an address, that are allowed in this time."""
MAX_SOURCES = 10_000
"""Names and addresses that are remembered before old ones are removed."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A signed-in user."""

    id: int
    principal: Principal
    csrf: str
    has_password: bool


class Sessions:
    """The sessions of one database, and the failed sign-ins of this process. Methods are synchronous, like those of
    `Accounts`."""

    def __init__(self, accounts: Accounts, mode: Literal["off", "invitation", "open"]):
        self.accounts, self.mode = accounts, mode
        self._failures: dict[str, list[float]] = {}
        """Times of failed sign-ins by name and by address, and of new accounts by address."""

    def sign_in(self, name: str, password: str, address: str, agent: str, old_token: str = "") -> str:
        """Start a session; returns its token. old_token: a session that ends with it.

        Raises AuthenticationError for a wrong password, RateLimited after many of them.
        """
        for source in (f"name {name}", f"address {address}"):
            self._check_count(source, "failed sign-ins")
        try:
            user_id = self._check(name, password)
        except AuthenticationError:
            for source in (f"name {name}", f"address {address}"):
                self._count(source)
            raise
        self._failures.pop(f"name {name}", None)
        return self._start(user_id, agent, old_token)

    def sign_up(self, name: str, password: str, invitation: str, address: str, agent: str) -> str:
        """Make a user and start a session; returns its token. Raises RequestError, PermissionDenied, RateLimited."""
        self._check_count(f"new accounts {address}", "new accounts")
        self._count(f"new accounts {address}")
        if self.mode == "off":
            raise PermissionDenied("this server makes no accounts on the page; ask its administrator for one")
        check_new_password(password)
        hashed = hash_key(invitation)
        if self.mode == "invitation" and not self._is_valid(hashed):
            raise PermissionDenied("the invitation is unknown, used or expired; ask for a new one")
        try:
            user_id = self.accounts.add_user(name)
        except ConfigError as error:
            raise RequestError(str(error), "name") from error
        if self.mode == "invitation" and not self._use_invitation(hashed):  # somebody else has used it meanwhile
            self.accounts.change_user(user_id, disabled=True)
            raise PermissionDenied("the invitation was used at the same time; ask for a new one")
        self.accounts.set_password(user_id, password)
        return self._start(user_id, agent)

    def find(self, token: str) -> Session:
        """The session of a token. Raises AuthenticationError."""
        now_ms = self._now_ms()
        statement = select(
            sessions.c.id, sessions.c.last_seen_ms, users.c.id.label("user_id"), users.c.password_hash, users.c.disabled
        ).join(users, users.c.id == sessions.c.user_id)
        with self.accounts.database.read() as connection:
            row = connection.execute(statement.where(sessions.c.token_hash == hash_key(token))).mappings().one_or_none()
        if row is None or row["disabled"] or row["last_seen_ms"] < now_ms - IDLE_MS:
            raise AuthenticationError("you are signed out; sign in again")
        if row["last_seen_ms"] < now_ms - SEEN_MS:
            with self.accounts.database.write() as connection:
                connection.execute(update(sessions).where(sessions.c.id == row["id"]).values(last_seen_ms=now_ms))
        return Session(
            id=row["id"],
            principal=self.accounts.page_principal(row["user_id"]),
            csrf=csrf_token(token),
            has_password=row["password_hash"] is not None,
        )

    def list_sessions(self, user_id: int) -> list[dict[str, Any]]:
        """The sessions of a user, the last used first."""
        columns = (sessions.c.id, sessions.c.created_ms, sessions.c.last_seen_ms, sessions.c.agent)
        statement = select(*columns).where(sessions.c.user_id == user_id).order_by(sessions.c.last_seen_ms.desc())
        with self.accounts.database.read() as connection:
            return [dict(row) for row in connection.execute(statement).mappings()]

    def end(self, user_id: int, session_id: int) -> None:
        """End a session of a user."""
        with self.accounts.database.write() as connection:
            is_theirs = (sessions.c.id == session_id) & (sessions.c.user_id == user_id)
            connection.execute(delete(sessions).where(is_theirs))

    def change_password(self, session: Session, old: str, new: str) -> None:
        """Set a new password and end all other sessions. Raises AuthenticationError, RequestError."""
        principal = session.principal
        if session.has_password:
            self.accounts.check_password(principal.user_name, old)
        check_new_password(new)
        self.accounts.set_password(principal.user_id, new)
        with self.accounts.database.write() as connection:
            others = (sessions.c.user_id == principal.user_id) & (sessions.c.id != session.id)
            connection.execute(delete(sessions).where(others))

    def invite(self, user_id: int) -> str:
        """Make an invitation for one new user; returns it."""
        token = secrets.token_urlsafe(18)
        values = {"token_hash": hash_key(token), "user_id": user_id, "expires_ms": self._now_ms() + INVITATION_MS}
        with self.accounts.database.write() as connection:
            connection.execute(delete(invitations).where(invitations.c.expires_ms < self._now_ms()))
            connection.execute(insert(invitations).values(values))
        return token

    def _check(self, name: str, password: str) -> int:
        """The user with this name and password, or with this API key instead, as the first user has one only."""
        if password.startswith("sk-"):
            found = self.accounts.authenticate(password)
            if found.user_name != name or "chat" not in found.scopes:
                raise AuthenticationError("wrong user name or password")
            return found.user_id
        if len(password) > MAX_PASSWORD:
            raise AuthenticationError("wrong user name or password")
        return self.accounts.check_password(name, password)

    def _start(self, user_id: int, agent: str, old_token: str = "") -> str:
        token, now_ms = secrets.token_urlsafe(32), self._now_ms()
        values = {
            "user_id": user_id, "token_hash": hash_key(token), "agent": agent[:200],
            "created_ms": now_ms, "last_seen_ms": now_ms,
        }  # fmt: skip
        with self.accounts.database.write() as connection:
            ended = (sessions.c.token_hash == hash_key(old_token)) | (sessions.c.last_seen_ms < now_ms - IDLE_MS)
            connection.execute(delete(sessions).where(ended))
            connection.execute(insert(sessions).values(values))
        return token

    def _is_valid(self, hashed: str) -> bool:
        condition = (invitations.c.token_hash == hashed) & (invitations.c.expires_ms >= self._now_ms())
        with self.accounts.database.read() as connection:
            return connection.execute(select(invitations.c.token_hash).where(condition)).first() is not None

    def _use_invitation(self, hashed: str) -> bool:
        with self.accounts.database.write() as connection:
            return connection.execute(delete(invitations).where(invitations.c.token_hash == hashed)).rowcount == 1

    def _check_count(self, source: str, what: str) -> None:
        recent = self._recent(source, time.monotonic())
        if len(recent) >= MAX_FAILURES:
            wait = math.ceil(FAILURE_SECONDS - (time.monotonic() - recent[0]))
            raise RateLimited(f"too many {what}; try again in {wait} seconds", "sign_in", MAX_FAILURES, wait)

    def _count(self, source: str) -> None:
        now = time.monotonic()
        if len(self._failures) >= MAX_SOURCES:
            self._failures = {each: recent for each in self._failures if (recent := self._recent(each, now))}
        self._failures[source] = [*self._recent(source, now), now]

    def _recent(self, source: str, now: float) -> list[float]:
        return [moment for moment in self._failures.get(source, ()) if now - moment < FAILURE_SECONDS]

    def _now_ms(self) -> int:
        return int(self.accounts.clock() * 1000)


def csrf_token(token: str) -> str:
    """What a page of this session knows and a page of a stranger does not."""
    return hash_key(f"csrf {token}")[:32]


def check_new_password(password: str) -> None:
    """Raise RequestError for a password that is too short or too long."""
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise RequestError(
            f"the password has {len(password):,} characters; use {MIN_PASSWORD} to {MAX_PASSWORD:,}", "password"
        )
