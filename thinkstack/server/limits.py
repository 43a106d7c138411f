"""Limits on requests, as columns of a user or key and one condition on them.

Requests and tokens a minute are buckets that leak: `*_used` rises with each request and falls with time, at the rate of
the limit. A request passes if what is left in the bucket and the request fit the limit. The unit of `*_used` is
1/60,000 of a request or token, because a limit of L a minute then leaks exactly L units a millisecond.

Prompt tokens count when a request is admitted, completion tokens when it is settled, so that a request without
max_tokens does not take the whole minute; a bucket may exceed its limit by what was admitted before.
"""

import datetime
import functools
import math
from dataclasses import dataclass

from sqlalchemy import BigInteger, RowMapping, Table, Update, bindparam, case, literal, update

from thinkstack.server.errors import RateLimited

UNITS = 60_000
"""Units of one request or token in a bucket."""
DAY_MS = 86_400_000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a user or key; 0: no limit."""

    requests_per_minute: int = 600
    tokens_per_minute: int = 1_000_000
    """Prompt and completion tokens."""
    concurrency: int = 64
    """Requests that are admitted and not settled."""
    deep_think_per_day: int = 50
    """Deep Think messages in a UTC day."""


LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrency", "deep_think_per_day")
BUCKETS = {"requests_per_minute": "requests_used", "tokens_per_minute": "tokens_used"}
"""Limits that are buckets, and their columns."""
UNLIMITED = Limits(requests_per_minute=0, tokens_per_minute=0, concurrency=0, deep_think_per_day=0)


def limits_of(row: RowMapping, prefix: str, default: Limits) -> Limits:
    """The limits in the columns `prefix` + name of a row; NULL: the default."""
    values = {name: row[prefix + name] for name in LIMITS}
    return Limits(**{name: getattr(default, name) if value is None else value for name, value in values.items()})


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a request takes from the limits."""

    now_ms: int
    """Milliseconds since 1970, UTC."""
    prompt_tokens: int
    deep_think: bool


@functools.cache
def limit_update(table: Table, limited: tuple[str, ...]) -> Update:
    """The UPDATE that takes a request from the limits of one row, under the condition that it passes all of them.

    limited: names of the limits to look at. Its parameters are those of `limit_parameters` and id_.
    """
    now, columns = bindparam("now", type_=BigInteger), table.c
    elapsed = case(
        (columns.limits_ms >= now, literal(0, BigInteger)),
        (columns.limits_ms < now - DAY_MS, literal(DAY_MS, BigInteger)),  # what 64 bits hold, times any limit
        else_=now - columns.limits_ms,
    )
    later = case((columns.limits_ms < now, now), else_=columns.limits_ms)
    statement = update(table).where(columns.id == bindparam("id_")).values(limits_ms=later)
    for limit, column in BUCKETS.items():
        if limit in limited:
            left = columns[column] - elapsed * bindparam(f"{limit}_limit", type_=BigInteger)
            left = case((left > 0, left), else_=literal(0, BigInteger))
            statement = statement.values({column: left + bindparam(f"{limit}_taken", type_=BigInteger)})
            statement = statement.where(left <= bindparam(f"{limit}_room", type_=BigInteger))
        else:
            statement = statement.values({column: 0})  # no debt waits for the day on which a limit is set
    if "deep_think_per_day" in limited:
        is_today = columns.deep_think_day == bindparam("today")
        used = case((is_today, columns.deep_think_used), else_=literal(0, BigInteger))
        statement = statement.values(deep_think_day=bindparam("today"), deep_think_used=used + 1)
        statement = statement.where(used < bindparam("deep_think_per_day_limit"))
    return statement


def limit_parameters(limits: Limits, demand: Demand) -> tuple[tuple[str, ...], dict[str, int]]:
    """The limits that a request has to pass, and the parameters of `limit_update` for them."""
    limited, values = [], {"now": demand.now_ms, "today": demand.now_ms // DAY_MS}
    for limit, amount in _demanded(demand):
        if value := getattr(limits, limit):
            limited.append(limit)
            values |= {f"{limit}_limit": value, f"{limit}_taken": amount * UNITS, f"{limit}_room": _room(value, amount)}
    return tuple(limited), values


def check_limits(row: RowMapping, limits: Limits, demand: Demand, whose: str) -> None:
    """Raise RateLimited for the first limit that a request does not pass, given the columns of its row now."""
    elapsed = min(max(0, demand.now_ms - row["limits_ms"]), DAY_MS)
    for limit, amount in _demanded(demand)[:2]:
        value = getattr(limits, limit)
        excess = max(0, row[BUCKETS[limit]] - elapsed * value) - _room(value, amount)
        if value and excess > 0:
            raise refusal(limit, value, math.ceil(excess / value / 1000), whose)
    today = demand.now_ms // DAY_MS
    is_used_up = row["deep_think_day"] == today and row["deep_think_used"] >= limits.deep_think_per_day
    if demand.deep_think and limits.deep_think_per_day and is_used_up:
        midnight_ms = (today + 1) * DAY_MS
        raise refusal("deep_think_per_day", limits.deep_think_per_day, -(-(midnight_ms - demand.now_ms) // 1000), whose)


def refusal(limit: str, value: int, retry_after_seconds: int, whose: str) -> RateLimited:
    """The error for a limit that is reached."""
    when = datetime.timedelta(seconds=retry_after_seconds)
    text = f"{whose} has reached its limit {limit}={value:,}; try again in {when} (h:mm:ss)"
    return RateLimited(text, limit, value, retry_after_seconds)


def _demanded(demand: Demand) -> list[tuple[str, int]]:
    """(limit, amount) for all limits of `limit_update`."""
    demanded = [("requests_per_minute", 1), ("tokens_per_minute", demand.prompt_tokens)]
    return [*demanded, ("deep_think_per_day", 1)] if demand.deep_think else demanded


def _room(limit: int, amount: int) -> int:
    """How full a bucket may be when a request of this amount comes; one above the limit waits for an empty bucket."""
    return (limit - min(amount, limit)) * UNITS
