"""The database: migrations, URLs, and what happens when it is locked or full."""

import contextlib
import sqlite3
import stat
import threading
import time
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from tests.server.billing import PRICES, add_customer, ask, end
from thinkstack.server.accounts import Accounts
from thinkstack.server.database import MIGRATIONS, Database, metadata, sqlite_url
from thinkstack.server.errors import DatabaseUnavailable
from thinkstack.server.page import tables  # noqa: F401, which adds them to metadata
from thinkstack.types import ConfigError

TIMEOUT_SECONDS = 0.5


@pytest.fixture
def database(url):
    with contextlib.closing(Database(url, TIMEOUT_SECONDS)) as database:
        yield database


def test_migrations_make_the_schema_that_the_code_reads(database):
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_migrated_database_is_opened_as_it_is(url, database):
    Accounts(database).add_user("ann")
    with contextlib.closing(Database(url)) as again:
        assert [user["name"] for user in Accounts(again).list_users()] == ["ann"]


def test_processes_that_start_together_migrate_once(url):
    opened, threads = [], []
    for _ in range(4):
        threads.append(threading.Thread(target=lambda: opened.append(Database(url))))
    _ = [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(opened) == 4
    with opened[0].read() as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).all() == [("0002",)]
    for database in opened:
        database.close()


def test_a_database_of_a_newer_version_is_refused(url, database):
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0942'"))
    with pytest.raises(ConfigError, match=r"has revision 0942, .* revisions up to 0002; update thinkstack"):
        Database(url)
    with database.read() as connection:
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "0942"


def test_every_migration_is_package_data():
    pattern = '"server/migrations/versions/*.py"'
    assert list((MIGRATIONS / "versions").glob("v*.py"))
    assert pattern in (MIGRATIONS.parents[2] / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "cannot read the URL"),
        ("nonsense", "cannot read the URL"),
        ("mysql://host/name", "known: sqlite, postgresql\\+psycopg"),
        ("postgresql://host/name", "known: sqlite, postgresql\\+psycopg"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:////dev/null/accounts.sqlite3", "choose another folder"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url, message):
    with pytest.raises(ConfigError, match=message):
        Database(url)


def test_a_password_in_a_url_is_not_shown():
    with pytest.raises(DatabaseUnavailable) as refused:
        Database("postgresql+psycopg://ann:secret@127.0.0.1:1/name", TIMEOUT_SECONDS)
    assert "secret" not in str(refused.value) and "127.0.0.1" in str(refused.value)


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "accounts.sqlite3").write_bytes(b"hello, this is not a database, and it is long enough" * 99)
    with pytest.raises(ConfigError, match="file is not a database; name another"):
        Database(sqlite_url(tmp_path))


def test_the_sqlite_file_is_private_and_in_wal_mode(tmp_path):
    with contextlib.closing(Database(sqlite_url(tmp_path / "new" / "folder"))) as database:
        file = Path(str(database.engine.url.database))
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
        with database.read() as connection:
            found = [
                connection.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")
            ]
        assert found == ["wal", 1, 1]


@contextlib.contextmanager
def locked(database):
    """Another process that holds the lock on the rows or the file."""
    if database.is_sqlite:
        with contextlib.closing(sqlite3.connect(str(database.engine.url.database))) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
    else:
        psycopg = pytest.importorskip("psycopg")
        target = database.engine.url
        with psycopg.connect(f"host={target.query['host']} user={target.username} dbname={target.database}") as other:
            other.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
            yield


def test_a_locked_database_is_an_error_within_the_time_limit_and_passes(database):
    accounts = Accounts(database, PRICES)
    ann = add_customer(accounts, topped_up="1")
    accounts.reserve(ann, ask("a"))
    with locked(database):
        if database.is_sqlite:  # readers do not wait
            assert accounts.balance(ann.user_id).reserved_pico == 137_000_000
        for call in (lambda: accounts.reserve(ann, ask("b")), lambda: accounts.settle([end("a", miss=1)])):
            started = time.monotonic()
            with pytest.raises(DatabaseUnavailable, match="try again later"):
                call()
            assert time.monotonic() - started < 10 * TIMEOUT_SECONDS
    accounts.reserve(ann, ask("b"))
    assert accounts.settle([end("a", miss=1), end("b", miss=1)]) == 2


def test_threads_that_wait_for_the_writer_give_up_in_time(tmp_path):
    with contextlib.closing(Database(sqlite_url(tmp_path), TIMEOUT_SECONDS)) as database:
        accounts = Accounts(database)
        errors = []

        def wait():
            try:
                accounts.sweep()
                accounts.add_user("bob")
            except DatabaseUnavailable as error:
                errors.append(str(error))

        with database.write():
            thread = threading.Thread(target=wait)
            thread.start()
            thread.join(10 * TIMEOUT_SECONDS)
        assert len(errors) == 1 and "is busy for 0.5 seconds" in errors[0]


def test_a_full_disk_refuses_the_request_and_the_server_goes_on(tmp_path):
    with contextlib.closing(Database(sqlite_url(tmp_path), TIMEOUT_SECONDS)) as database:
        accounts = Accounts(database, PRICES)
        ann = add_customer(accounts, topped_up="1")
        with database.read() as connection:
            pages = connection.scalar(text("PRAGMA page_count"))
            connection.execute(text(f"PRAGMA max_page_count = {pages + 2}"))
        admitted = []
        with pytest.raises(DatabaseUnavailable, match="database or disk is full"):
            for number in range(1000):
                accounts.reserve(ann, ask(f"r{number}-{'x' * 500}"))
                admitted.append(f"r{number}-{'x' * 500}")
        assert 0 < len(admitted) < 100
        assert accounts.balance(ann.user_id).reserved_pico == len(admitted) * 137_000_000
        with database.read() as connection:
            connection.execute(text("PRAGMA max_page_count = 1000000"))
        assert accounts.release(admitted) == len(admitted)
        assert accounts.balance(ann.user_id).reserved_pico == 0
