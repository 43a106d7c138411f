"""Reservations and the append-only ledger, as functions on a connection inside a transaction.

A request is admitted by `reserve`, which sets its largest possible cost aside; `note` records what was delivered so
far; `settle` charges what was delivered, frees the rest and writes one row of the ledger. A balance cannot become
negative: nothing is charged that was not reserved before.

Rows are locked in one order (reservations, users, keys, processes; each by id), so that transactions cannot wait for
each other in a circle.
"""

import datetime
import functools
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from sqlalchemy import (
    BigInteger,
    Connection,
    RowMapping,
    Update,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)  # fmt: skip
from sqlalchemy.dialects import postgresql, sqlite

from thinkstack.server.database import PRICES, TOKENS, deposits, keys, ledger, processes, reservations, users
from thinkstack.server.errors import InsufficientBalance
from thinkstack.server.keys import Principal
from thinkstack.server.limits import UNITS, Demand, check_limits, limit_parameters, limit_update, refusal
from thinkstack.server.prices import MAX_PICO, Price, Usage, format_amount
from thinkstack.types import ConfigError

log = logging.getLogger(__name__)
MAX_CONCURRENCY = 2**31 - 1
Group = Literal["day", "model", "key", "user"]


@dataclass(frozen=True, kw_only=True)
class Settlement:
    """The end of one request: what was delivered, and how it ended ("stop", "length", "abort", "error" ...)."""

    request_id: str
    usage: Usage
    status: str


@dataclass(frozen=True, kw_only=True)
class UsageRow:
    """The sums of a part of the ledger."""

    group: str
    """The day, model, key prefix or user name."""
    requests: int
    usage: Usage
    cost_pico: int


@dataclass(frozen=True, kw_only=True)
class Admission:
    """A request that asks for admission."""

    request_id: str
    """Unique for ever, such as a UUID."""
    model: str
    prompt_tokens: int
    max_completion_tokens: int
    """The most tokens that may be delivered, over all choices."""
    deep_think: bool = False
    """Whether it counts as a Deep Think message."""

    def __post_init__(self) -> None:
        assert 0 <= self.prompt_tokens < 2**31 and self.max_completion_tokens >= 0, self


def reserve(
    connection: Connection, principal: Principal, request: Admission, price: Price, process_id: str, now_ms: int
) -> None:
    """Check the limits and set the largest possible cost aside, or raise and leave no trace (roll back!).

    One conditional UPDATE decides on balance and limits of the user, one on those of the key if it has any, and one
    conditional INSERT on concurrency; the lock on the user's row orders requests of one user.
    Raises InsufficientBalance, RateLimited.
    """
    cost = price.max_cost_pico(request.prompt_tokens, request.max_completion_tokens)
    demand = Demand(now_ms=now_ms, prompt_tokens=request.prompt_tokens, deep_think=request.deep_think)
    if cost > MAX_PICO:
        raise InsufficientBalance(
            f"the request may cost {format_amount(cost)}, more than any balance; lower max_tokens"
        )
    limited, values = limit_parameters(principal.limits, demand)
    values |= {"id_": principal.user_id, "cost": cost}
    if not connection.execute(_user_update(limited), values).rowcount:
        # key_share: rows that are inserted elsewhere and refer to this one do not wait
        locked = select(users).where(users.c.id == principal.user_id).with_for_update(key_share=True)
        row = connection.execute(locked).mappings().one()
        check_limits(row, principal.limits, demand, f"user {principal.user_name}")
        left = row["granted_pico"] + row["topped_up_pico"] - row["reserved_pico"]
        if left >= cost:  # another process has settled a request in between; the row is locked now
            return reserve(connection, principal, request, price, process_id, now_ms)
        raise InsufficientBalance(
            f"the request may cost {format_amount(cost)}, and {format_amount(left)} of the balance of "
            f"{principal.user_name} is free; top it up, lower max_tokens or wait for running requests"
        )
    if principal.has_key_limits:
        limited, values = limit_parameters(principal.key_limits, demand)
        if not connection.execute(limit_update(keys, limited), values | {"id_": principal.key_id}).rowcount:
            row = connection.execute(select(keys).where(keys.c.id == principal.key_id)).mappings().one()
            check_limits(row, principal.key_limits, demand, f"key {principal.key_prefix}")
            raise AssertionError("the UPDATE and check_limits disagree")
    _insert(connection, principal, request, price, process_id, cost, now_ms)


@functools.cache
def _user_update(limited: tuple[str, ...]) -> Update:
    """The one statement that takes a request from limits and balance of a user, if both allow it."""
    cost = bindparam("cost", type_=BigInteger)
    free = users.c.granted_pico + users.c.topped_up_pico - users.c.reserved_pico
    return limit_update(users, limited).where(free >= cost).values(reserved_pico=users.c.reserved_pico + cost)


def _insert(
    connection: Connection,
    principal: Principal,
    request: Admission,
    price: Price,
    process_id: str,
    cost: int,
    now_ms: int,
) -> None:
    """Insert the reservation unless too many are running."""
    values = {
        "request_id": request.request_id, "process_id": process_id, "reserved_pico": cost,
        "user_id": principal.user_id, "key_id": principal.key_id, "model": request.model, "price_id": price.id,
        "hit_pico": price.hit_pico, "miss_pico": price.miss_pico, "output_pico": price.output_pico,
        "admitted_ms": now_ms,
    }  # fmt: skip
    values = {f"new_{name}": value for name, value in values.items()}
    user_limit, key_limit = principal.limits.concurrency, principal.key_limits.concurrency
    more = {"user_limit": user_limit or MAX_CONCURRENCY, "key_limit": key_limit or MAX_CONCURRENCY}
    if connection.execute(_INSERT, values | more).rowcount:
        return
    if connection.scalar(select(_IS_USED), values):
        raise ValueError(f"request id {request.request_id} was used before; request ids must be unique")
    if user_limit and (connection.scalar(select(_USER_RUNNING), values) or 0) >= user_limit:
        raise refusal("concurrency", user_limit, 1, f"user {principal.user_name}")
    raise refusal("concurrency", key_limit, 1, f"key {principal.key_prefix}")


_RUNNING = select(func.count()).select_from(reservations)
_USER_RUNNING = _RUNNING.where(reservations.c.user_id == bindparam("new_user_id")).scalar_subquery()
_KEY_RUNNING = _RUNNING.where(reservations.c.key_id == bindparam("new_key_id")).scalar_subquery()
_IS_USED = or_(*(exists().where(table.c.request_id == bindparam("new_request_id")) for table in (ledger, reservations)))
_INSERTED = [column for column in reservations.c if column.name not in TOKENS]
_INSERT = (
    insert(reservations)
    .from_select(
        [*(column.name for column in _INSERTED), *TOKENS],
        select(
            *(bindparam(f"new_{column.name}", type_=column.type) for column in _INSERTED),
            *(literal(0, BigInteger).label(name) for name in TOKENS),
        ).where(~_IS_USED, bindparam("user_limit") > _USER_RUNNING, bindparam("key_limit") > _KEY_RUNNING),
    )
    .execution_options(preserve_rowcount=True)
)


def note(connection: Connection, delivered: Mapping[str, Usage]) -> list[str]:
    """Record what requests have delivered so far; return the ids of those without a reservation.

    Those were settled, or have lapsed: what they deliver from now on cannot be charged.
    """
    rows = connection.execute(_LOCK, {"ids": list(delivered)}).mappings().all()
    open_ids = [row["request_id"] for row in rows]
    if open_ids:
        connection.execute(_NOTE, [{"id_": id_, **asdict(delivered[id_])} for id_ in open_ids])
    return sorted(set(delivered) - set(open_ids))


def settle(connection: Connection, ends: Iterable[Settlement], now_ms: int) -> int:
    """Charge what was delivered and free the rest; requests that are settled already are left alone.

    Returns the number of requests that were settled by this call.
    """
    by_id = {end.request_id: end for end in ends}
    rows = connection.execute(_LOCK, {"ids": list(by_id)}).mappings().all()
    return _close(connection, [(row, by_id[row["request_id"]]) for row in rows], now_ms)


def release(connection: Connection, request_ids: Iterable[str], status: str, now_ms: int) -> int:
    """Settle requests with what was noted. Returns how many there were."""
    rows = connection.execute(_LOCK, {"ids": list(request_ids)}).mappings().all()
    return _close(connection, [(row, _noted(row, status)) for row in rows], now_ms)


def beat(connection: Connection, process_id: str, now_ms: int) -> None:
    """Write the heartbeat of a process."""
    make = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement = make(processes).values(id=process_id, heartbeat_ms=now_ms)
    connection.execute(statement.on_conflict_do_update(index_elements=["id"], set_={"heartbeat_ms": now_ms}))


def sweep(connection: Connection, oldest_ms: int, now_ms: int) -> int:
    """Settle the reservations of processes whose heartbeat is older than `oldest_ms` with what was noted.

    Returns how many there were.
    """
    rows = connection.execute(_LOCK_ORPHANS, {"oldest": oldest_ms}).mappings().all()
    count = _close(connection, [(row, _noted(row, "lapsed")) for row in rows], now_ms)
    connection.execute(delete(processes).where(processes.c.heartbeat_ms < oldest_ms))
    return count


def has_orphans(connection: Connection, oldest_ms: int) -> bool:
    """Whether `sweep` would find a reservation."""
    return connection.execute(_ORPHANS.limit(1), {"oldest": oldest_ms}).first() is not None


def _noted(row: RowMapping, status: str) -> Settlement:
    return Settlement(request_id=row["request_id"], usage=Usage(**{name: row[name] for name in TOKENS}), status=status)


def _close(connection: Connection, ends: Sequence[tuple[RowMapping, Settlement]], now_ms: int) -> int:
    """Move locked reservations to the ledger."""
    if not ends:
        return 0
    day = datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC).date().isoformat()
    entries = []
    changes: dict[int, dict[str, int]] = defaultdict(lambda: {"cost": 0, "freed": 0, "used": 0})
    tokens: dict[int, int] = defaultdict(int)
    for row, end in ends:
        price = Price(id=row["price_id"], **{name: row[name] for name in PRICES})
        cost = price.cost_pico(end.usage)
        if cost > row["reserved_pico"]:
            log.error("request %s delivered more than was reserved for it; it pays the reservation", end.request_id)
            cost = row["reserved_pico"]
        kept = {name: value for name, value in row.items() if name in ledger.c}
        entries.append(
            kept | asdict(end.usage) | {"cost_pico": cost, "status": end.status, "settled_ms": now_ms, "day": day}
        )
        used = end.usage.completion_tokens * UNITS
        change = changes[row["user_id"]]
        change["cost"], change["freed"] = change["cost"] + cost, change["freed"] + row["reserved_pico"]
        change["used"] += used
        tokens[row["key_id"]] += used
    connection.execute(_DELETE, {"ids": [row["request_id"] for row, _ in ends]})
    connection.execute(_CHARGE, [{"id_": user_id, **change} for user_id, change in sorted(changes.items())])
    connection.execute(_COUNT, [{"id_": key_id, "used": used} for key_id, used in sorted(tokens.items())])
    connection.execute(_APPEND, entries)
    return len(ends)


_IS_NAMED = reservations.c.request_id.in_(bindparam("ids", expanding=True))
_LIVE = select(processes.c.id).where(processes.c.heartbeat_ms >= bindparam("oldest"))
_LOCK = select(reservations).where(_IS_NAMED).order_by(reservations.c.request_id).with_for_update()
_ORPHANS = select(reservations).where(reservations.c.process_id.not_in(_LIVE)).order_by(reservations.c.request_id)
_LOCK_ORPHANS = _ORPHANS.with_for_update(skip_locked=True)
_DELETE = delete(reservations).where(_IS_NAMED)
_APPEND = insert(ledger)
_NOTE = (
    update(reservations)
    .where(reservations.c.request_id == bindparam("id_"))
    .values({name: bindparam(name) for name in TOKENS})
)
_CHARGE = (
    update(users)
    .where(users.c.id == bindparam("id_"))
    .values(
        granted_pico=case(
            (users.c.granted_pico >= bindparam("cost"), users.c.granted_pico - bindparam("cost")), else_=literal(0)
        ),
        topped_up_pico=case(
            (users.c.granted_pico >= bindparam("cost"), users.c.topped_up_pico),
            else_=users.c.topped_up_pico - (bindparam("cost") - users.c.granted_pico),
        ),
        reserved_pico=users.c.reserved_pico - bindparam("freed"),
        tokens_used=users.c.tokens_used + bindparam("used"),
    )
)
_COUNT = (
    update(keys)
    .where(keys.c.id == bindparam("id_"), keys.c.tokens_per_minute > 0)
    .values(tokens_used=keys.c.tokens_used + bindparam("used"))
)


def deposit(connection: Connection, user_id: int, kind: str, amount_pico: int, now_ms: int) -> None:
    """Add money to a balance; kind: "granted" or "topped_up"."""
    column = users.c[f"{kind}_pico"]
    fits = users.c.granted_pico + users.c.topped_up_pico <= MAX_PICO - amount_pico
    if not connection.execute(
        update(users).where(users.c.id == user_id, fits).values({column: column + amount_pico})
    ).rowcount:
        raise ConfigError(f"a balance holds at most {format_amount(MAX_PICO)}; deposit less")
    connection.execute(insert(deposits).values(user_id=user_id, kind=kind, amount_pico=amount_pico, created_ms=now_ms))


def usage(connection: Connection, by: Group, user_id: int | None, since: datetime.date | None) -> list[UsageRow]:
    """The sums of the ledger, one row per day, model, key or user, in ascending order."""
    group = {"day": ledger.c.day, "model": ledger.c.model, "key": keys.c.prefix, "user": users.c.name}[by]
    sums = [func.sum(ledger.c[name]).label(name) for name in (*TOKENS, "cost_pico")]
    source = ledger.join(keys, keys.c.id == ledger.c.key_id).join(users, users.c.id == ledger.c.user_id)
    statement = select(group.label("group"), func.count().label("requests"), *sums).select_from(source)
    if user_id is not None:
        statement = statement.where(ledger.c.user_id == user_id)
    if since is not None:
        statement = statement.where(ledger.c.day >= since.isoformat())
    per_key = (keys.c.id,) if by == "key" else ()
    rows = connection.execute(statement.group_by(group, *per_key).order_by(group, *per_key)).mappings()
    return [
        UsageRow(
            group=row["group"],
            requests=row["requests"],
            usage=Usage(**{name: int(row[name]) for name in TOKENS}),
            cost_pico=int(row["cost_pico"]),
        )
        for row in rows
    ]
