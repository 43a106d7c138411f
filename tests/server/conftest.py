"""Databases of the tests: SQLite files, and a PostgreSQL server where one is installed."""

import glob
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from thinkstack.server.accounts import Accounts
from thinkstack.server.database import Database
from thinkstack.server.limits import UNLIMITED


def find_program(name):
    """Path of a program of PostgreSQL; Debian keeps them out of PATH."""
    return shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None)


def start_postgres(folder):
    """Start a server on a socket in `folder`; it refuses to run as root."""
    user = next((u.pw_name for u in pwd.getpwall() if u.pw_name in ("postgres", "nobody")), None)
    account = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
    if account:
        shutil.chown(folder, user)
    quiet = {"cwd": folder, "check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **account}
    data = folder / "data"
    words = ["-D", data, "-A", "trust", "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync"]
    subprocess.run([find_program("initdb"), *words], **quiet)
    options = f"-k {folder} -c listen_addresses='' -c fsync=off -c max_connections=100"
    words = ["-D", data, "-w", "-l", folder / "log", "-o", options, "start"]
    subprocess.run([find_program("pg_ctl"), *words], **quiet)
    return lambda: subprocess.run([find_program("pg_ctl"), "-D", data, "-m", "immediate", "stop"], **quiet)


@pytest.fixture(scope="session")
def postgres():
    """Empty the database of a PostgreSQL server and return its URL."""
    psycopg = pytest.importorskip("psycopg")
    if find_program("initdb") is None or find_program("pg_ctl") is None:
        pytest.skip("PostgreSQL is not installed")
    folder = Path(tempfile.mkdtemp(prefix="thinkstack-pg-"))  # short: a socket's path has at most 107 bytes
    stop = start_postgres(folder)

    def make_url():
        with psycopg.connect(f"host={folder} user=postgres dbname=postgres", autocommit=True) as connection:
            end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'postgres'"
            connection.execute(f"{end} AND pid <> pg_backend_pid()")  # killed processes leave connections
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return f"postgresql+psycopg://postgres@/postgres?host={folder}"

    yield make_url
    stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """URL of an empty database, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/accounts.sqlite3"
    return request.getfixturevalue("postgres")()


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    """A clock at 2025-03-01 12:00:00 UTC, a Saturday."""
    return Clock(1740830400.0)


@pytest.fixture
def open_accounts(url, clock):
    """Open the accounts of one process; all share a database and a clock."""
    opened = []

    def make(prices=None, limits=UNLIMITED, **values):
        opened.append(Database(url))
        return Accounts(opened[-1], prices, limits, clock=clock, **values)

    yield make
    for database in opened:
        database.close()
