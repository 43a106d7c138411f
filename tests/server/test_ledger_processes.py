"""Several processes on one database, and processes that are killed."""

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import defaultdict

import pytest
from sqlalchemy import func, select

from tests.server.billing import COST, PRICES, add_customer, ask, end, usage
from thinkstack.server.accounts import LAPSE_SECONDS, Accounts
from thinkstack.server.database import Database, ledger, reservations
from thinkstack.server.errors import InsufficientBalance
from thinkstack.server.limits import UNLIMITED
from thinkstack.server.prices import format_amount

KILLS = 20
FORK = multiprocessing.get_context("fork")  # the children open the database themselves


@pytest.fixture
def accounts(url):
    with contextlib.closing(Database(url)) as database:
        yield Accounts(database, PRICES, UNLIMITED)
        database.close()


def totals(accounts):
    """(sum of costs, rows, open reservations)."""
    with accounts.database.read() as connection:
        cost, count = connection.execute(select(func.sum(ledger.c.cost_pico), func.count()).select_from(ledger)).one()
        return int(cost or 0), count, connection.scalar(select(func.count()).select_from(reservations))


def spend(url, principal, name, outcomes):
    """Eight threads that send requests until the balance is spent."""
    accounts = Accounts(Database(url, timeout_seconds=60.0), PRICES, UNLIMITED)
    counts, errors = defaultdict(int), []

    def work(thread):
        seeded = random.Random(f"{name} {thread}")
        try:
            for number in range(1000):
                request_id = f"{name}-{thread}-{number}"
                accounts.reserve(principal, ask(request_id))
                accounts.note({request_id: usage(miss=100, completion=1)})
                tokens = seeded.randint(1, 100)
                assert accounts.settle([end(request_id, miss=100, completion=tokens)]) == 1
                counts[thread] += 100 * 270_000 + tokens * 1_100_000
        except InsufficientBalance:
            pass
        except Exception as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    _ = [thread.start() for thread in threads], [thread.join() for thread in threads]
    outcomes.put((sum(counts.values()), errors))


def test_two_processes_with_eight_threads_spend_one_balance_to_the_end(url, accounts):
    """Enough for about 120 requests of half the largest cost."""
    ann = add_customer(accounts, granted=format_amount(20 * COST), topped_up=format_amount(50 * COST))
    accounts.database.close()
    outcomes = FORK.Queue()
    processes = [FORK.Process(target=spend, args=(url, ann, name, outcomes)) for name in ("p", "q")]
    _ = [process.start() for process in processes]
    found = [outcomes.get(timeout=300) for _ in processes]
    _ = [process.join() for process in processes]
    assert [errors for _, errors in found] == [[], []]
    charged, count, running = totals(accounts)
    balance = accounts.balance(ann.user_id)
    assert charged == sum(cost for cost, _ in found) and count > 70 and running == 0
    assert balance.total_pico == 70 * COST - charged and balance.reserved_pico == 0
    assert 0 <= balance.total_pico < COST


def interfere(url, principals, counter, outcomes):
    """Four threads that reserve, note, settle, release and sweep the newest requests of all processes."""
    accounts = Accounts(Database(url, timeout_seconds=60.0), PRICES, UNLIMITED, lapse_seconds=0.05)
    errors = []

    def work(thread):
        seeded = random.Random(thread)
        try:
            for _ in range(40):
                ids = [f"r{max(0, counter.value - seeded.randrange(20))}" for _ in range(8)]
                call = seeded.choice(("reserve", "note", "settle", "release", "sweep"))
                if call == "reserve":
                    for _ in range(3):
                        with counter.get_lock():
                            counter.value += 1
                            request_id = f"r{counter.value}"
                        accounts.reserve(seeded.choice(principals), ask(request_id))
                elif call == "note":
                    accounts.note({request_id: usage(miss=1) for request_id in ids})
                elif call == "settle":
                    accounts.settle([end(request_id, miss=2) for request_id in ids])
                elif call == "release":
                    accounts.release(ids)
                else:
                    accounts.sweep()
        except Exception as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    _ = [thread.start() for thread in threads], [thread.join() for thread in threads]
    outcomes.put(errors)


def test_calls_on_the_same_requests_wait_for_each_other_in_no_circle(url, accounts):
    """Two reservations of one user and a settlement blocked each other: a row was locked against its references."""
    principals = [add_customer(accounts, topped_up="1", name=name) for name in ("ann", "bob")]
    principals += [
        accounts.authenticate(accounts.add_key(user.user_id, limits={"tokens_per_minute": 10**9}))
        for user in principals
    ]
    accounts.database.close()
    outcomes, counter = FORK.Queue(), FORK.Value("i", 0)
    processes = [FORK.Process(target=interfere, args=(url, principals, counter, outcomes)) for _ in range(2)]
    _ = [process.start() for process in processes]
    assert [outcomes.get(timeout=300) for _ in processes] == [[], []]
    _ = [process.join() for process in processes]
    late = Accounts(accounts.database, PRICES, UNLIMITED, clock=lambda: time.time() + 2 * LAPSE_SECONDS)
    late.sweep()
    assert totals(late)[1:] == (counter.value, 0)
    for user in principals[:2]:
        assert late.balance(user.user_id).reserved_pico == 0
    assert sum(late.balance(user.user_id).total_pico for user in principals[:2]) == 2 * 10**12 - totals(late)[0]


def stream(url, principal, name, log):
    """Serve requests of ten steps for ever, and log what each call is about to write, and what it has written."""
    accounts = Accounts(Database(url), PRICES, UNLIMITED)
    for number in range(100_000):
        ids = [f"{name}-{number}-{choice}" for choice in range(3)]
        for request_id in ids:
            accounts.reserve(principal, ask(request_id))
        for tokens in range(1, 11):
            log.send(("note", ids, tokens))
            accounts.note({request_id: usage(miss=100, completion=tokens) for request_id in ids})
            log.send(("noted", ids, tokens))
        log.send(("note", ids, 11))
        accounts.settle([end(request_id, miss=100, completion=11) for request_id in ids])
        log.send(("noted", ids, 11))


def read_log(receiver, sure, most):
    """Read the completion tokens per request that are written for sure, and those that are written at most."""
    with contextlib.suppress(EOFError):
        while True:
            kind, ids, tokens = receiver.recv()
            for request_id in ids:
                (most if kind == "note" else sure)[request_id] = tokens


def test_a_process_killed_at_any_moment_leaves_no_reservation_and_nobody_pays_more_than_was_noted(url, accounts):
    ann = add_customer(accounts, topped_up="1000")
    accounts.database.close()
    seeded = random.Random(0)
    sure, most = defaultdict(int), defaultdict(int)
    for kill in range(KILLS):
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=stream, args=(url, ann, f"k{kill}", sender))
        process.start()
        sender.close()
        assert receiver.poll(60)
        reader = threading.Thread(target=read_log, args=(receiver, sure, most))
        reader.start()
        time.sleep(seeded.uniform(0.0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reader.join()
    late = Accounts(accounts.database, PRICES, UNLIMITED, clock=lambda: time.time() + 2 * LAPSE_SECONDS)
    left = totals(late)[2]
    assert late.sweep() == left > 0
    charged, count, running = totals(late)
    assert running == 0 and count >= 3 * KILLS
    with late.database.read() as connection:
        rows = connection.execute(select(ledger)).mappings().all()
    for row in rows:
        assert sure[row["request_id"]] <= row["completion_tokens"] <= most[row["request_id"]]
    balance = late.balance(ann.user_id)
    assert balance.reserved_pico == 0 and balance.total_pico == 1000 * 10**12 - charged
