"""Users, keys, balances and the ledger: what the routes and the command line call.

All methods are synchronous and may be called from several threads; a route calls them in a thread
(`asyncio.to_thread`). Each is one transaction.
"""

import datetime
import math
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import RowMapping, Select, bindparam, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from thinkstack.config import did_you_mean
from thinkstack.server import ledger
from thinkstack.server.database import Database, keys, settings, users
from thinkstack.server.errors import AuthenticationError, InsufficientBalance, RateLimited
from thinkstack.server.keys import PREFIX_LENGTH, SCOPES, Principal, hash_key, make_key
from thinkstack.server.ledger import Admission, Group, Settlement, UsageRow
from thinkstack.server.limits import DAY_MS, LIMITS, UNLIMITED, Limits, limits_of
from thinkstack.server.prices import FREE, Price, PriceTable, Usage
from thinkstack.types import ConfigError

LAPSE_SECONDS = 15.0
"""A process without a heartbeat for this long is taken for dead, and its reservations lapse."""
BEAT_SECONDS = 1.0
"""Interval of heartbeats."""
LAST_USED_SECONDS = 60.0
"""Interval in which the last use of a key is written."""
REFUSALS = (InsufficientBalance, RateLimited, ConfigError, ValueError)
"""Why a request is not admitted, though the database works."""
PRINCIPAL_SECONDS = 1.0
"""How long a key counts after it was read: what another process changes has no effect for so long."""
MAX_PRINCIPALS = 10_000
PAGE_KEY = "page"
"""Name of the key of each user to which the page's requests are booked."""
NAME = re.compile(r"[A-Za-z0-9][\w.@+-]{0,63}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Money of one user in pico units; the grant is used first."""

    currency: str
    granted_pico: int
    topped_up_pico: int
    reserved_pico: int
    """The part that belongs to running requests."""
    is_available: bool
    """Whether anything is left for another request; always where requests cost nothing."""

    @property
    def total_pico(self) -> int:
        """Granted plus topped up."""
        return self.granted_pico + self.topped_up_pico


class Accounts:
    """The accounts in one database, as one process of the server sees them."""

    def __init__(
        self,
        database: Database,
        prices: PriceTable | None = None,
        limits: Limits = Limits(),
        lapse_seconds: float = LAPSE_SECONDS,
        clock: Callable[[], float] = time.time,
    ):
        """prices: None for a server that costs nothing; its requests are in the ledger too. limits: for users without
        limits of their own. clock: seconds since 1970; the clocks of all processes must agree within a second.

        Raises ConfigError if the amounts in the database are in another currency.
        """
        self.database, self.prices, self.limits, self.clock = database, prices, limits, clock
        self.lapse_seconds = lapse_seconds
        self.process_id = uuid.uuid4().hex
        self._last_beat_ms = 0
        self._principals: dict[str, tuple[float, Principal]] = {}
        """By hash of the key, with the time at which they were read."""
        with database.read() as connection:
            self.currency: str | None = connection.scalar(_CURRENCY)
        if prices is not None:
            self.currency = _agree_on_currency(database, prices.currency)

    def recent_principal(self, key: str) -> Principal | None:
        """The user of a key that was authenticated in the last second, without a look at the database."""
        read_at, found = self._principals.get(hash_key(key), (-math.inf, None))
        return found if time.monotonic() - read_at < PRINCIPAL_SECONDS else None

    def authenticate(self, key: str) -> Principal:
        """The user of a key. Raises AuthenticationError; the message never contains the key."""
        read_at = time.monotonic()
        found = self._authenticate(_BY_HASH, {"hash": (hashed := hash_key(key))})
        if len(self._principals) >= MAX_PRINCIPALS:
            self._principals.clear()
        self._principals[hashed] = read_at, found
        return found

    def principal(self, key_id: int) -> Principal:
        """The user of a key that is known by its id. Raises AuthenticationError."""
        return self._authenticate(_BY_ID, {"id": key_id})

    def page_principal(self, user_id: int) -> Principal:
        """The user of the page, whose requests are booked to a key that nobody knows. Raises AuthenticationError."""
        mine = (keys.c.user_id == user_id) & (keys.c.name == PAGE_KEY) & keys.c.revoked_ms.is_(None)
        statement = select(keys.c.id).where(mine).order_by(keys.c.id).limit(1)
        with self.database.read() as connection:
            key_id = connection.scalar(statement)
        if key_id is None:
            self.add_key(user_id, PAGE_KEY)
            return self.page_principal(user_id)
        return self.principal(key_id)

    def _authenticate(self, statement: Select[Any], values: Mapping[str, Any]) -> Principal:
        now_ms = self._now_ms()
        with self.database.read() as connection:
            row = connection.execute(statement, values).mappings().one_or_none()
        if row is None:
            raise AuthenticationError("the API key is unknown; give a key as 'Authorization: Bearer sk-...'")
        if row["revoked_ms"] is not None:
            raise AuthenticationError(f"the API key {row['prefix']} is revoked; use another one")
        if row["expires_ms"] is not None and row["expires_ms"] <= now_ms:
            raise AuthenticationError(f"the API key {row['prefix']} has expired; make a new one")
        if row["disabled"]:
            raise AuthenticationError(f"the user of the API key {row['prefix']} is disabled")
        stale_ms = now_ms - int(LAST_USED_SECONDS * 1000)
        if row["last_used_ms"] is None or row["last_used_ms"] <= stale_ms:
            is_stale = or_(keys.c.last_used_ms.is_(None), keys.c.last_used_ms <= stale_ms)
            with self.database.write() as connection:
                connection.execute(update(keys).where(keys.c.id == row["key_id"], is_stale).values(last_used_ms=now_ms))
        return Principal(
            user_id=row["user_id"],
            user_name=row["user_name"],
            is_admin=row["is_admin"],
            limits=limits_of(row, "user_", self.limits),
            key_id=row["key_id"],
            key_prefix=row["prefix"],
            key_limits=limits_of(row, "", UNLIMITED),
            scopes=_split(row["scopes"]),
            models=_split(row["models"]),
        )

    def reserve(self, principal: Principal, request: Admission) -> Price:
        """Admit a request: check the limits and set its largest cost aside, all or nothing.

        Returns its price, which is fixed now. Raises InsufficientBalance, RateLimited, DatabaseUnavailable, ConfigError
        for a model without a price, ValueError for an id that was used before.
        """
        (found,) = self.reserve_all([(principal, request)])
        if isinstance(found, Exception):
            raise found
        return found

    def reserve_all(self, wanted: Sequence[tuple[Principal, Admission]]) -> list[Price | Exception]:
        """`reserve` for several requests: the price or the error of each. One transaction if none is refused.

        Raises DatabaseUnavailable.
        """
        now_ms, found = self._now_ms(), dict[int, Price]()
        moment = datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC)
        try:
            with self.database.write() as connection:
                for place in sorted(range(len(wanted)), key=lambda place: wanted[place][0].user_id):  # order of locks
                    principal, request = wanted[place]
                    price = FREE if self.prices is None else self.prices.price(request.model, moment)
                    ledger.reserve(connection, principal, request, price, self.process_id, now_ms)
                    found[place] = price
                if now_ms - self._last_beat_ms >= BEAT_SECONDS * 1000:
                    ledger.beat(connection, self.process_id, now_ms)
        except REFUSALS as error:
            if len(wanted) == 1:
                return [error]
            return [self.reserve_all([each])[0] for each in wanted]
        self._last_beat_ms = max(self._last_beat_ms, now_ms)
        return [found[place] for place in range(len(wanted))]

    def note(self, delivered: Mapping[str, Usage]) -> list[str]:
        """Record what running requests have delivered so far, and write the heartbeat; call it once a second.

        Returns the ids that have no reservation any more: end these requests, they cannot be charged.
        """
        now_ms = self._now_ms()
        with self.database.write() as connection:
            lost = ledger.note(connection, delivered)
            ledger.beat(connection, self.process_id, now_ms)
        self._last_beat_ms = now_ms
        return lost

    def settle(self, ends: Iterable[Settlement]) -> int:
        """Charge what requests delivered and write the ledger. A request is settled once; later calls change nothing.

        Returns the number of requests that this call settled.
        """
        with self.database.write() as connection:
            return ledger.settle(connection, ends, self._now_ms())

    def release(self, request_ids: Iterable[str], status: str = "error") -> int:
        """Settle requests with what was noted; for a `finally`: a settled request is left alone."""
        with self.database.write() as connection:
            return ledger.release(connection, request_ids, status, self._now_ms())

    def sweep(self) -> int:
        """Settle what dead processes left behind, with what they had noted; any process may call it.

        Returns the number of requests.
        """
        now_ms = self._now_ms()
        oldest_ms = now_ms - int(self.lapse_seconds * 1000)
        with self.database.read() as connection:
            if not ledger.has_orphans(connection, oldest_ms):
                return 0
        with self.database.write() as connection:
            return ledger.sweep(connection, oldest_ms, now_ms)

    def balance(self, user_id: int) -> Balance:
        """The balance of a user."""
        columns = (users.c.granted_pico, users.c.topped_up_pico, users.c.reserved_pico)
        with self.database.read() as connection:
            row = connection.execute(select(*columns).where(users.c.id == user_id)).mappings().one()
        left = row["granted_pico"] + row["topped_up_pico"] - row["reserved_pico"]
        return Balance(currency=self.currency or "USD", is_available=self.prices is None or left > 0, **row)

    def deep_think_used(self, user_id: int) -> int:
        """Deep Think messages of a user in this UTC day."""
        columns = (users.c.deep_think_day, users.c.deep_think_used)
        with self.database.read() as connection:
            day, used = connection.execute(select(*columns).where(users.c.id == user_id)).one()
        return int(used) if day == self._now_ms() // DAY_MS else 0

    def deposit(self, user_id: int, amount_pico: int, kind: str = "topped_up") -> None:
        """Add money to a balance; kind: "granted" or "topped_up"."""
        with self.database.write() as connection:
            ledger.deposit(connection, user_id, kind, amount_pico, self._now_ms())

    def usage(
        self, by: Group = "day", user_id: int | None = None, since: datetime.date | None = None
    ) -> list[UsageRow]:
        """The sums of the ledger per day (UTC), model, key or user; of one user or of all."""
        with self.database.read() as connection:
            return ledger.usage(connection, by, user_id, since)

    def add_user(self, name: str, is_admin: bool = False) -> int:
        """Add a user; returns its id. Raises ConfigError for a name that is taken or malformed."""
        if not NAME.fullmatch(name):
            raise ConfigError(f"cannot name a user {name!r}; use up to 64 letters, digits and . _ @ + -")
        try:
            with self.database.write() as connection:
                values = {"name": name, "is_admin": is_admin, "created_ms": self._now_ms()}
                return int(connection.execute(insert(users).values(values).returning(users.c.id)).scalar_one())
        except IntegrityError as error:
            raise ConfigError(f"the user {name} exists already; choose another name") from error

    def user_id(self, name: str) -> int:
        """The id of a user. Raises ConfigError for an unknown name."""
        with self.database.read() as connection:
            found = {name: id_ for name, id_ in connection.execute(select(users.c.name, users.c.id))}
        if name not in found:
            raise ConfigError(f"no user {name!r}{did_you_mean(name, found)}")
        return found[name]

    def list_users(self) -> list[RowMapping]:
        """The rows of all users, by name, without their passwords."""
        columns = [column for column in users.c if column is not users.c.password_hash]
        with self.database.read() as connection:
            return list(connection.execute(select(*columns).order_by(users.c.name)).mappings().all())

    def change_user(self, user_id: int, **values: int | bool | None) -> None:
        """Change `disabled`, `is_admin` or limits of a user; a limit of None is the default, 0 none."""
        _check_names(values, ("disabled", "is_admin", *LIMITS))
        with self.database.write() as connection:
            connection.execute(update(users).where(users.c.id == user_id).values(values))
        self._principals.clear()

    def set_password(self, user_id: int, password: str) -> None:
        """Set the password for the page, stored as an argon2id hash."""
        from argon2 import PasswordHasher

        password_hash = PasswordHasher().hash(password)
        with self.database.write() as connection:
            connection.execute(update(users).where(users.c.id == user_id).values(password_hash=password_hash))

    def check_password(self, name: str, password: str) -> int:
        """The id of the user with this name and password.

        Raises AuthenticationError with one message for every reason, after the same work.
        """
        from argon2 import PasswordHasher
        from argon2.exceptions import VerificationError

        with self.database.read() as connection:
            row = connection.execute(select(users).where(users.c.name == name)).mappings().one_or_none()
        has_password = row is not None and row["password_hash"] is not None and not row["disabled"]
        hasher = PasswordHasher()
        if row is None or not has_password:
            hasher.hash(password)  # takes as long as a comparison
            raise AuthenticationError("wrong user name or password")
        try:
            hasher.verify(row["password_hash"], password)
        except VerificationError as error:
            raise AuthenticationError("wrong user name or password") from error
        return int(row["id"])

    def add_key(
        self,
        user_id: int,
        name: str = "",
        scopes: Iterable[str] = ("chat",),
        models: Iterable[str] = (),
        expires_seconds: int | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> str:
        """Make a key; it is returned once and only its hash is stored. Raises ConfigError for an unknown scope."""
        _check_names(dict.fromkeys(scopes), SCOPES)
        _check_names(limits or {}, LIMITS)
        key, now_ms = make_key(), self._now_ms()
        values = {
            "user_id": user_id, "hash": hash_key(key), "prefix": key[:PREFIX_LENGTH], "name": name,
            "created_ms": now_ms, "scopes": ",".join(scopes), "models": ",".join(models),
            "expires_ms": None if expires_seconds is None else now_ms + 1000 * expires_seconds,
        }  # fmt: skip
        with self.database.write() as connection:
            if "admin" in scopes and not connection.scalar(select(users.c.is_admin).where(users.c.id == user_id)):
                raise ConfigError("the scope admin is for administrators; add the user with --admin")
            connection.execute(insert(keys).values(**values, **(limits or {})))
        return key

    def list_keys(self) -> list[RowMapping]:
        """The rows of all keys with their users' names, by user and time, without hashes."""
        columns = [column for column in keys.c if column is not keys.c.hash]
        statement = select(*columns, users.c.name.label("user_name")).join(users, users.c.id == keys.c.user_id)
        with self.database.read() as connection:
            return list(connection.execute(statement.order_by(users.c.name, keys.c.id)).mappings().all())

    def revoke_key(self, prefix: str) -> str:
        """Revoke the key that begins with `prefix`; returns its stored prefix. Raises ConfigError unless it is one."""
        found = [row for row in self.list_keys() if row["prefix"].startswith(prefix[:PREFIX_LENGTH])]
        if not prefix or len(found) != 1:
            names = ", ".join(row["prefix"] for row in found[:5])
            reason = f"{len(found)} keys begin with it ({names}); give more of it" if found else "no key begins with it"
            raise ConfigError(f"cannot revoke {prefix!r}: {reason}; `thinkstack keys list` shows all keys")
        with self.database.write() as connection:
            is_active = (keys.c.id == found[0]["id"]) & keys.c.revoked_ms.is_(None)
            connection.execute(update(keys).where(is_active).values(revoked_ms=self._now_ms()))
        self._principals.clear()
        return str(found[0]["prefix"])

    def _now_ms(self) -> int:
        return int(self.clock() * 1000)


def _agree_on_currency(database: Database, currency: str) -> str:
    """Make a currency that of the database, or raise ConfigError if that is another one."""
    with database.write() as connection:
        found = connection.scalar(_CURRENCY)
        if found is None:
            connection.execute(insert(settings).values(name="currency", value=currency))
    if found not in (None, currency):
        raise ConfigError(
            f"the prices are in {currency} and the balances of {database.name} in {found}; "
            "use prices in that currency or another database"
        )
    return currency


def _split(words: str) -> tuple[str, ...]:
    return tuple(filter(None, words.split(",")))


def _check_names(given: Mapping[str, Any], known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown {name!r}{did_you_mean(name, known)}")


_CURRENCY = select(settings.c.value).where(settings.c.name == "currency")
_PRINCIPAL = (
    select(
        keys.c.id.label("key_id"), keys.c.user_id, keys.c.prefix, keys.c.scopes, keys.c.models, keys.c.expires_ms,
        keys.c.revoked_ms, keys.c.last_used_ms, *(keys.c[name] for name in LIMITS),
        users.c.name.label("user_name"), users.c.is_admin, users.c.disabled,
        *(users.c[name].label(f"user_{name}") for name in LIMITS)
    )
    .join(users, users.c.id == keys.c.user_id)
)  # fmt: skip
_BY_HASH = _PRINCIPAL.where(keys.c.hash == bindparam("hash"))
_BY_ID = _PRINCIPAL.where(keys.c.id == bindparam("id"))
