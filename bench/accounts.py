"""CPU and wall time of the accounts: authenticate, reserve, note and settle, alone and in batches.

    python bench/accounts.py [--database postgresql+psycopg://...] [--json FILE]

Without --database: SQLite in a temporary folder. The CPU time is that of this process; a PostgreSQL server has its own.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

from common import Row, machine, print_table, write_json

from thinkstack.server.accounts import Accounts
from thinkstack.server.database import Database, sqlite_url
from thinkstack.server.ledger import Admission, Settlement
from thinkstack.server.limits import Limits
from thinkstack.server.prices import PICO, PriceTable, Usage

LIMITS = Limits(requests_per_minute=10**9, tokens_per_minute=10**9, concurrency=10**9)
PRICE = {"input_hit": Decimal("0.07"), "input_miss": Decimal("0.27"), "output": Decimal("1.10")}
REQUESTS, BATCH = 512, 64
USAGE = Usage(prompt_cache_miss_tokens=100, completion_tokens=50)


def measure(name: str, work: Callable[[int], object], repeats: int, requests: int = 1) -> list[Row]:
    """CPU and wall microseconds a request, after one call that does not count."""
    work(0)
    cpu, wall = time.process_time(), time.perf_counter()
    for number in range(1, repeats + 1):
        work(number)
    scale = 1e6 / repeats / requests
    values = {"CPU": (time.process_time() - cpu) * scale, "wall": (time.perf_counter() - wall) * scale}
    return [
        Row(name=f"{name}, {kind}", value=value, unit="us/request", n=repeats * requests, machine=machine())
        for kind, value in values.items()
    ]


def measure_all(accounts: Accounts) -> list[Row]:
    """The calls of a request, alone and 64 requests in one transaction."""
    user_id = accounts.add_user(f"bench-{time.time_ns()}")
    accounts.deposit(user_id, 1000 * PICO)
    key = accounts.add_key(user_id)
    principal = accounts.authenticate(key)
    run = str(time.time_ns())

    def reserve(number: int) -> None:
        request_id = f"{run}-{number}"
        accounts.reserve(
            principal,
            Admission(request_id=request_id, model="m", prompt_tokens=100, max_completion_tokens=100),
        )

    def settle(numbers: range) -> None:
        accounts.settle([Settlement(request_id=f"{run}-{n}", usage=USAGE, status="stop") for n in numbers])

    def note(number: int) -> None:
        accounts.note({f"{run}-{n}": USAGE for n in range(1000, 1000 + BATCH)})

    rows = measure("authenticate", lambda number: accounts.authenticate(key), REQUESTS)
    rows += measure("reserve and settle", lambda n: (reserve(n), settle(range(n, n + 1))), REQUESTS)
    rows += measure("reserve", lambda n: reserve(n + 1000), REQUESTS)
    rows += measure(f"note, {BATCH} at a time", note, REQUESTS // BATCH, BATCH)
    batches = range(1000, 1001 + REQUESTS, BATCH)
    work = [range(start, start + BATCH) for start in batches]
    return rows + measure(f"settle, {BATCH} at a time", lambda n: settle(work[n]), REQUESTS // BATCH, BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", help="URL of a database; default SQLite in a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        database = Database(given.database or sqlite_url(Path(folder)))
        prices = PriceTable({"currency": "USD", "models": {"m": [PRICE]}})
        rows = measure_all(Accounts(database, prices, LIMITS))
        database.close()
    cells = [(row.name, f"{row.value:.0f}", str(row.n)) for row in rows]
    print_table(database.name.split(":")[0], ("", "us/request", "n"), cells)
    print(machine())
    write_json(given.json, rows)


if __name__ == "__main__":
    main()
