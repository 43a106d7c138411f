"""Commands on the accounts of a server: users, keys and usage. They work while the server runs."""

import datetime
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from thinkstack.cli.arguments import Name
from thinkstack.types import ConfigError

if TYPE_CHECKING:
    from thinkstack.server.accounts import Accounts

Database = Annotated[str, arg(metavar="URL", help="Database, such as postgresql+psycopg://user@host/name.")]
Data = Annotated[
    Path | None, arg(metavar="FOLDER", help="Folder of the SQLite database; default ~/.local/share/thinkstack.")
]
Amount = Annotated[str, arg(metavar="AMOUNT")]
Limit = Annotated[tuple[str, ...], UseAppendAction, arg(metavar="NAME=N")]
Names = Annotated[tuple[str, ...], UseAppendAction, arg(metavar="NAME")]


def add(
    name: Annotated[Name, Positional],
    /,
    admin: bool = False,
    grant: Amount = "0",
    limit: Limit = (),
    database: Database = "",
    data: Data = None,
) -> None:
    """Add a user.

    Args:
        name: Name of the user: letters, digits and . _ @ + -
        admin: Let its keys have the scope admin.
        grant: Money granted to the user, such as 5.00.
        limit: A limit of its own, such as requests_per_minute=60; 0 is no limit. May be repeated.
    """
    from thinkstack.server.prices import parse_amount

    limits, amount, accounts = _parse_limits(limit), parse_amount(grant), _open(database, data, is_new=True)
    user_id = accounts.add_user(name, admin)
    if limits:
        accounts.change_user(user_id, **limits)
    if amount:
        accounts.deposit(user_id, amount, "granted")
    print(f"added {name}; make a key with: thinkstack keys new {name}")


def change(
    name: Annotated[Name, Positional],
    /,
    top_up: Amount = "0",
    grant: Amount = "0",
    limit: Limit = (),
    disabled: bool | None = None,
    database: Database = "",
    data: Data = None,
) -> None:
    """Add money to a user's balance, or change its limits.

    Args:
        name: Name of the user.
        top_up: Money that the user paid, such as 20.00.
        grant: Money granted to the user, used before what was paid.
        limit: A limit of its own, such as requests_per_minute=60; 0 is no limit. May be repeated.
        disabled: Whether requests of the user are refused.
    """
    from thinkstack.server.prices import format_amount, parse_amount

    amounts = {"topped_up": parse_amount(top_up), "granted": parse_amount(grant)}
    limits, accounts = _parse_limits(limit), _open(database, data)
    user_id = accounts.user_id(name)
    values: dict[str, int | bool | None] = {**limits, **({} if disabled is None else {"disabled": disabled})}
    if values:
        accounts.change_user(user_id, **values)
    for kind, amount in amounts.items():
        if amount:
            accounts.deposit(user_id, amount, kind)
    print(f"{name}: balance {format_amount(accounts.balance(user_id).total_pico)}")


def disable(name: Annotated[Name, Positional], /, database: Database = "", data: Data = None) -> None:
    """Refuse all requests of a user from now on; `accounts change NAME --disabled False` allows them again.

    Args:
        name: Name of the user.
    """
    accounts = _open(database, data)
    accounts.change_user(accounts.user_id(name), disabled=True)
    print(f"disabled {name}")


def list_users(database: Database = "", data: Data = None) -> None:
    """List all users with their balances and limits."""
    from thinkstack.server.limits import LIMITS
    from thinkstack.server.prices import format_amount

    rows = []
    for user in _open(database, data).list_users():
        marks = [word for word, is_set in (("admin", user["is_admin"]), ("disabled", user["disabled"])) if is_set]
        own = [f"{limit}={user[limit]}" for limit in LIMITS if user[limit] is not None]
        amounts = [format_amount(user[f"{kind}_pico"]) for kind in ("granted", "topped_up", "reserved")]
        rows.append((user["name"], " ".join(marks), *amounts, " ".join(own)))
    _print_table(("user", "", "granted", "topped up", "reserved", "limits"), rows)


def new_key(
    user: Annotated[Name, Positional],
    /,
    name: Name = "",
    expires: Annotated[str, arg(metavar="TIME")] = "",
    scope: Names = (),
    model: Names = (),
    limit: Limit = (),
    database: Database = "",
    data: Data = None,
) -> None:
    """Make an API key for a user and print it. It is shown only now: the database has its hash.

    Args:
        user: Name of the user.
        name: A name for the key.
        expires: Time after which the key expires, such as 12h, 90d or 4w; default never.
        scope: chat (the default) or admin. May be repeated.
        model: A model the key is for; default all. May be repeated.
        limit: A limit of the key beside those of the user, such as tokens_per_minute=10000. May be repeated.
    """
    from thinkstack.server.keys import parse_expiry

    limits, seconds = _parse_limits(limit), parse_expiry(expires) if expires else None
    accounts = _open(database, data)
    print(accounts.add_key(accounts.user_id(user), name, scope or ("chat",), model, seconds, limits))


def list_keys(database: Database = "", data: Data = None) -> None:
    """List all keys by the start that is kept of them."""
    rows = [
        (key["prefix"], key["user_name"], key["name"], key["scopes"], key["models"] or "all",
         *(_date(key[f"{when}_ms"]) for when in ("expires", "revoked", "last_used")))
        for key in _open(database, data).list_keys()
    ]  # fmt: skip
    _print_table(("key", "user", "name", "scopes", "models", "expires", "revoked", "last used"), rows)


def revoke(prefix: Annotated[Name, Positional], /, database: Database = "", data: Data = None) -> None:
    """Revoke a key: requests with it are refused from now on.

    Args:
        prefix: The start of the key, as `thinkstack keys list` shows it.
    """
    print(f"revoked {_open(database, data).revoke_key(prefix)}")


def usage(
    by: Literal["day", "model", "key", "user"] = "day",
    user: Name = "",
    since: Annotated[str, arg(metavar="DATE")] = "",
    database: Database = "",
    data: Data = None,
) -> None:
    """Show requests, tokens and costs, summed from the ledger.

    Args:
        by: One row per day (UTC), model, key or user.
        user: Only requests of this user.
        since: Only requests that ended on this day or later, such as 2026-11-30.
    """
    from thinkstack.server.prices import format_amount

    try:
        first = datetime.date.fromisoformat(since) if since else None
    except ValueError as error:
        raise ConfigError(f"--since {since} is not a date; write it as 2026-11-30") from error
    accounts = _open(database, data)
    rows = [
        (row.group, f"{row.requests:,}", *(f"{tokens:,}" for tokens in vars(row.usage).values()),
         format_amount(row.cost_pico))
        for row in accounts.usage(by, accounts.user_id(user) if user else None, first)
    ]  # fmt: skip
    cost = f"cost [{accounts.currency}]" if accounts.currency else "cost"
    _print_table((by, "requests", "prompt, cached", "prompt, computed", "completion", "reasoning", cost), rows)


ACCOUNTS: dict[str, Callable[..., None]] = {"add": add, "list": list_users, "change": change, "disable": disable}
KEYS: dict[str, Callable[..., None]] = {"new": new_key, "list": list_keys, "revoke": revoke}


def _open(database: str, data: Path | None, is_new: bool = False) -> "Accounts":
    """Open the accounts. is_new: whether the SQLite file may be made; a wrong folder is an error otherwise."""
    from thinkstack.server.accounts import Accounts
    from thinkstack.server.database import Database, data_folder, sqlite_file, sqlite_url

    if database and data is not None:
        raise ConfigError("--database and --data both name a database; leave one of them out")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    folder = data or data_folder()
    if not (database or is_new or sqlite_file(folder).exists()):
        raise ConfigError(
            f"{folder} has no accounts; the first start of `thinkstack serve` makes them: give its --data or --database"
        )
    return Accounts(Database(database or sqlite_url(folder)))


def _parse_limits(words: tuple[str, ...]) -> dict[str, int]:
    from thinkstack.config import did_you_mean
    from thinkstack.server.limits import LIMITS

    limits = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in LIMITS:
            raise ConfigError(f"unknown limit {name!r}{did_you_mean(name, LIMITS)}")
        if not value.isdecimal() or int(value) >= 2**31:
            raise ConfigError(f"--limit {word}: the value is not a number from 0 to 2147483647; write {name}=60")
        limits[name] = int(value)
    return limits


def _date(moment_ms: int | None) -> str:
    if moment_ms is None:
        return "-"
    return f"{datetime.datetime.fromtimestamp(moment_ms / 1000, datetime.UTC):%Y-%m-%d %H:%M}"


def _print_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
