"""The database of the accounts: schema, connections and migrations, for SQLite and PostgreSQL.

SQLite runs in WAL mode with synchronous=NORMAL: a killed process loses nothing, and a power failure may lose the
transactions since the last checkpoint, never more and never the consistency of the file. PostgreSQL loses nothing.
Times are milliseconds since 1970 (UTC), amounts are integers of 1e-12 of a currency unit.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    text,
)  # fmt: skip
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from thinkstack.server.errors import DatabaseUnavailable
from thinkstack.server.limits import LIMITS
from thinkstack.types import ConfigError

MIGRATIONS = Path(__file__).parent / "migrations"
TIMEOUT_SECONDS = 5.0
"""How long a call waits for a locked database."""
MIGRATION_LOCK = 0x7468696E6B
"""Number of the PostgreSQL lock under which processes migrate one after the other."""
POOL_SIZE = 8

metadata = MetaData()
BigId = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows only for INTEGER


def _limit_columns() -> list[Column[Any]]:
    """Limits of their own (NULL: the default; 0: none) and what is used of them, see server/limits.py."""
    used = ("limits_ms", "requests_used", "tokens_used", "deep_think_day", "deep_think_used")
    limits: list[Column[Any]] = [Column(name, Integer) for name in LIMITS]
    return [*limits, *(Column(name, BigInteger, nullable=False, server_default=text("0")) for name in used)]


users = Table(
    "users", metadata,
    Column("id", BigId, primary_key=True),
    Column("name", String, nullable=False, unique=True),
    Column("password_hash", String),
    Column("is_admin", Boolean, nullable=False),
    Column("disabled", Boolean, nullable=False, server_default=text("false")),
    Column("created_ms", BigInteger, nullable=False),
    Column("granted_pico", BigInteger, nullable=False, server_default=text("0")),
    Column("topped_up_pico", BigInteger, nullable=False, server_default=text("0")),
    Column("reserved_pico", BigInteger, nullable=False, server_default=text("0")),
    *_limit_columns(),
    CheckConstraint(
        "granted_pico >= 0 AND topped_up_pico >= 0 AND reserved_pico >= 0"
        " AND granted_pico + topped_up_pico >= reserved_pico",
        name="balance_is_never_negative",
    ),
)  # fmt: skip
"""The balance is granted + topped up; `reserved` of it belongs to requests that are running."""

keys = Table(
    "keys", metadata,
    Column("id", BigId, primary_key=True),
    Column("user_id", BigInteger, ForeignKey("users.id"), nullable=False, index=True),
    Column("hash", String, nullable=False, unique=True),
    Column("prefix", String, nullable=False, index=True),
    Column("name", String, nullable=False),
    Column("scopes", String, nullable=False),
    Column("models", String, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
    Column("expires_ms", BigInteger),
    Column("revoked_ms", BigInteger),
    Column("last_used_ms", BigInteger),
    *_limit_columns(),
)  # fmt: skip
"""scopes and models are separated by commas; no models: all models."""

processes = Table(
    "processes", metadata,
    Column("id", String, primary_key=True),
    Column("heartbeat_ms", BigInteger, nullable=False),
)  # fmt: skip

TOKENS = ("prompt_cache_hit_tokens", "prompt_cache_miss_tokens", "completion_tokens", "reasoning_tokens")
PRICES = ("hit_pico", "miss_pico", "output_pico")


def _request_columns() -> list[Column[Any]]:
    """Whose request it is, what it delivered, and its price."""
    return [
        Column("user_id", BigInteger, ForeignKey("users.id"), nullable=False),
        Column("key_id", BigInteger, ForeignKey("keys.id"), nullable=False),
        Column("model", String, nullable=False),
        Column("price_id", String, nullable=False),
        *(Column(name, BigInteger, nullable=False) for name in (*PRICES, *TOKENS)),
        Column("admitted_ms", BigInteger, nullable=False),
    ]


reservations = Table(
    "reservations", metadata,
    Column("request_id", String, primary_key=True),
    Column("process_id", String, nullable=False, index=True),
    Column("reserved_pico", BigInteger, nullable=False),
    *_request_columns(),
    Index("ix_reservations_user_id", "user_id"),
    Index("ix_reservations_key_id", "key_id"),
)  # fmt: skip
"""Requests that are admitted and not settled, with the tokens noted so far."""

ledger = Table(
    "ledger", metadata,
    Column("id", BigId, primary_key=True),
    Column("request_id", String, nullable=False, unique=True),
    *_request_columns(),
    Column("cost_pico", BigInteger, nullable=False),
    Column("status", String, nullable=False),
    Column("settled_ms", BigInteger, nullable=False),
    Column("day", String, nullable=False),
    Index("ix_ledger_user_id_day", "user_id", "day"),
)  # fmt: skip
"""One row per settled request; triggers refuse every change. day: UTC date of the settlement, as 2026-11-30."""

deposits = Table(
    "deposits", metadata,
    Column("id", BigId, primary_key=True),
    Column("user_id", BigInteger, ForeignKey("users.id"), nullable=False),
    Column("kind", String, nullable=False),
    Column("amount_pico", BigInteger, nullable=False),
    Column("created_ms", BigInteger, nullable=False),
)  # fmt: skip
"""Money added to balances, "granted" or "topped_up"; append-only like the ledger."""

settings = Table(
    "settings", metadata, Column("name", String, primary_key=True), Column("value", String, nullable=False)
)  # fmt: skip
"""The currency of all amounts."""


def data_folder() -> Path:
    """The default folder of the database: thinkstack in XDG_DATA_HOME or ~/.local/share."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "thinkstack"


def sqlite_file(folder: Path) -> Path:
    """The SQLite database in a folder."""
    return folder / "accounts.sqlite3"


def sqlite_url(folder: Path) -> str:
    """URL of the SQLite database in a folder."""
    return URL.create("sqlite", database=str(sqlite_file(folder))).render_as_string()


class Database:
    """Transactions on one database.

    Threads may share it. With SQLite one thread writes at a time; readers do not wait.
    """

    def __init__(self, url: str, timeout_seconds: float = TIMEOUT_SECONDS):
        """Open the database and apply the migrations it lacks; a SQLite file and its folder are created, private.

        Raises ConfigError for a URL that cannot be used and for a database of a newer version, DatabaseUnavailable.
        """
        self.timeout_seconds = timeout_seconds
        target = _parse_url(url)
        self.name = target.render_as_string(hide_password=True)
        self.is_sqlite = target.get_backend_name() == "sqlite"
        self._writers = threading.BoundedSemaphore(1 if self.is_sqlite else POOL_SIZE)
        if self.is_sqlite:
            _create_file(Path(str(target.database)))
        timeout_ms = int(timeout_seconds * 1000)
        # A process that is stopped inside a transaction must not hold its locks for ever.
        options = {"lock_timeout": timeout_ms, "statement_timeout": timeout_ms,
                   "idle_in_transaction_session_timeout": 2 * timeout_ms}  # fmt: skip
        arguments: dict[str, Any] = {"timeout": timeout_seconds} if self.is_sqlite else {
            "connect_timeout": max(2, int(timeout_seconds)),
            "options": " ".join(f"-c {name}={value}" for name, value in options.items()),
        }  # fmt: skip
        try:
            self.engine = create_engine(
                target,
                connect_args=arguments,
                pool_size=POOL_SIZE,
                max_overflow=POOL_SIZE,
                pool_timeout=timeout_seconds,
            )
        except ModuleNotFoundError as error:
            raise ConfigError(f"{self.name} needs {error.name}; pip install 'thinkstack[postgres]'") from error
        if self.is_sqlite:
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        self._readers = self.engine.execution_options(sqlite_begin="BEGIN")
        try:
            migrate(self)
        except DatabaseError as error:
            reason = " ".join(str(error.orig).split())
            raise ConfigError(f"cannot use {self.name}: {reason}; name another database") from error

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads. Raises DatabaseUnavailable."""
        with self._translate(), self._readers.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction, committed at the end and rolled back by an exception. Raises DatabaseUnavailable."""
        if not self._writers.acquire(timeout=self.timeout_seconds):
            raise DatabaseUnavailable(f"{self.name} is busy for {self.timeout_seconds:g} seconds; try again later")
        try:
            with self._translate(), self.engine.begin() as connection:
                yield connection
        finally:
            self._writers.release()

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextlib.contextmanager
    def _translate(self) -> Iterator[None]:
        try:
            yield
        except PoolTimeout as error:
            raise DatabaseUnavailable(f"{self.name}: no free connection; try again later") from error
        except DBAPIError as error:
            if isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated:
                reason = " ".join(str(error.orig).split())
                raise DatabaseUnavailable(f"{self.name}: {reason}; try again later") from error
            raise


def migrate(database: Database) -> None:
    """Apply the migrations that a database lacks, one process at a time.

    Raises ConfigError for a database that a newer version of the package has migrated.
    """
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from alembic import command
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    script = ScriptDirectory.from_config(config)
    head = script.get_current_head()
    known = {revision.revision for revision in script.walk_revisions()}
    with database.read() as connection:
        revision = MigrationContext.configure(connection).get_current_revision()
    if revision == head:
        return
    with database.write() as connection:
        if not database.is_sqlite:  # SQLite has one writer anyway
            connection.execute(text("SET LOCAL lock_timeout = '60s'"))
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
        revision = MigrationContext.configure(connection).get_current_revision()
        if revision is not None and revision not in known:
            raise ConfigError(
                f"{database.name} has revision {revision}, and this version of thinkstack knows revisions up "
                f"to {head}; update thinkstack or use another database"
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _parse_url(url: str) -> URL:
    try:
        target = make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"cannot read the URL {url!r}; write postgresql+psycopg://... or sqlite:///FILE") from error
    if target.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ConfigError(f"unknown database {target.drivername!r}; known: sqlite, postgresql+psycopg")
    if target.drivername == "sqlite" and target.database in (None, "", ":memory:"):
        raise ConfigError(f"{url} names no file; processes and threads share a file, write sqlite:///FILE")
    return target


def _create_file(path: Path) -> None:
    """Create a file for its owner alone: it holds names and hashes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error


def _configure_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # this module begins transactions, see _begin_sqlite
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # IMMEDIATE waits for the lock; a transaction that first reads could not wait for it afterwards.
    connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN IMMEDIATE"))
