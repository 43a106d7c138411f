"""Reservations, settlements and the ledger: sums worked out by hand."""

import datetime
import threading

import pytest
from sqlalchemy import delete, insert, select, text, update
from sqlalchemy.exc import DBAPIError

from tests.server.billing import COST, PRICES, add_customer, ask, end, usage
from thinkstack.server.database import deposits, ledger
from thinkstack.server.errors import InsufficientBalance
from thinkstack.server.prices import PICO, format_amount, parse_amount
from thinkstack.types import ConfigError


def amounts(accounts, principal):
    """(granted, topped up, reserved) as text."""
    found = accounts.balance(principal.user_id)
    return tuple(format_amount(amount) for amount in (found.granted_pico, found.topped_up_pico, found.reserved_pico))


def rows(accounts):
    with accounts.database.read() as connection:
        return connection.execute(select(ledger).order_by(ledger.c.request_id)).mappings().all()


def test_the_largest_cost_is_reserved_and_what_was_delivered_is_charged(open_accounts):
    """Reserved: 100 * 0.27 + 100 * 1.10 = 137 USD per 1M; charged: 64 * 0.07 + 36 * 0.27 + 50 * 1.10 = 69.2."""
    accounts = open_accounts(PRICES)
    ann = add_customer(accounts, topped_up="1")
    accounts.reserve(ann, ask("a"))
    assert amounts(accounts, ann) == ("0.00", "1.00", "0.000137")
    assert accounts.settle([end("a", hit=64, miss=36, completion=50, reasoning=20)]) == 1
    assert amounts(accounts, ann) == ("0.00", "0.9999308", "0.00")
    (row,) = rows(accounts)
    assert row["cost_pico"] == 69_200_000 == 64 * 70_000 + 36 * 270_000 + 50 * 1_100_000
    assert (row["status"], row["price_id"], row["day"]) == ("stop", "deepseek-chat@1970-01-01T00:00Z", "2025-03-01")
    assert (row["hit_pico"], row["miss_pico"], row["output_pico"]) == (70_000, 270_000, 1_100_000)
    assert row["reasoning_tokens"] == 20 and row["key_id"] == ann.key_id


def test_the_grant_is_used_before_what_was_paid(open_accounts):
    accounts = open_accounts(PRICES)
    ann = add_customer(accounts, granted="0.0001", topped_up="1")
    for request_id in ("a", "b"):
        accounts.reserve(ann, ask(request_id))
        accounts.settle([end(request_id, miss=100, completion=100)])
    assert amounts(accounts, ann) == ("0.00", "0.999826", "0.00")  # 1.0001 - 2 * 0.000137
    found = accounts.balance(ann.user_id)
    assert found.currency == "USD" and found.is_available and found.total_pico == parse_amount("0.999826")


def test_a_balance_for_one_request_serves_one(open_accounts):
    accounts = open_accounts(PRICES)
    ann = add_customer(accounts, granted="0.000136", topped_up="0.000001")
    accounts.reserve(ann, ask("a"))
    assert not accounts.balance(ann.user_id).is_available
    with pytest.raises(InsufficientBalance, match=r"may cost 0\.000137, and 0\.00 of the balance of ann is free"):
        accounts.reserve(ann, ask("b"))
    accounts.settle([end("a", miss=1)])
    with pytest.raises(InsufficientBalance):
        accounts.reserve(ann, ask("b"))
    accounts.reserve(ann, ask("b", 100, 99))


def test_parallel_requests_on_a_balance_for_one_serve_one(open_accounts):
    accounts = open_accounts(PRICES)
    ann = add_customer(accounts, topped_up=format_amount(COST))
    outcomes, barrier = [], threading.Barrier(8)

    def send(number):
        barrier.wait()
        try:
            accounts.reserve(ann, ask(f"r{number}"))
            outcomes.append("served")
        except InsufficientBalance:
            outcomes.append("refused")

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    _ = [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert sorted(outcomes) == ["refused"] * 7 + ["served"]


def test_a_cost_beyond_any_balance_is_refused(open_accounts):
    accounts = open_accounts(PRICES)
    with pytest.raises(InsufficientBalance, match="more than any balance"):
        accounts.reserve(add_customer(accounts, topped_up="4000000"), ask("a", 10**9, 10**15))


def test_a_request_is_settled_once(open_accounts):
    accounts = open_accounts(PRICES)
    ann = add_customer(accounts, topped_up="1")
    accounts.reserve(ann, ask("a"))
    assert accounts.settle([end("a", miss=1)]) == 1
    assert accounts.settle([end("a", miss=100, completion=100), end("never", miss=1)]) == 0
    assert accounts.release(["a", "never"]) == 0
    assert amounts(accounts, ann)[1:] == ("0.99999973", "0.00") and len(rows(accounts)) == 1


def test_threads_that_settle_the_same_request_charge_it_once(open_accounts):
    accounts = open_accounts(PRICES)
    ann = add_customer(accounts, topped_up="1")
    accounts.reserve(ann, ask("a"))
    counts = []
    threads = [threading.Thread(target=lambda: counts.append(accounts.settle([end("a", miss=1)]))) for _ in range(6)]
    _ = [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert sorted(counts) == [0, 0, 0, 0, 0, 1]


def test_one_transaction_settles_many_requests(open_accounts):
    accounts = open_accounts(PRICES)
    ann, bob = add_customer(accounts, topped_up="1"), add_customer(accounts, topped_up="1", name="bob")
    for number in range(40):
        accounts.reserve((ann, bob)[number % 2], ask(f"r{number}"))
    assert accounts.note({f"r{number}": usage(miss=1) for number in range(40)}) == []
    assert accounts.settle([end(f"r{number}", miss=number) for number in range(40)]) == 40
    assert amounts(accounts, ann)[1] == "0.9998974"  # (0 + 2 + ... + 38) * 0.27 per 1M = 102.6
    assert amounts(accounts, bob)[1] == "0.999892"  # (1 + 3 + ... + 39) * 0.27 per 1M = 108


def test_a_request_id_is_used_once(open_accounts):
    accounts = open_accounts(PRICES)
    ann = add_customer(accounts, topped_up="1")
    accounts.reserve(ann, ask("a"))
    accounts.settle([end("a", miss=1)])
    accounts.reserve(ann, ask("b"))
    for request_id in ("a", "b"):
        with pytest.raises(ValueError, match="was used before"):
            accounts.reserve(ann, ask(request_id))
    assert amounts(accounts, ann)[2] == "0.000137"


def test_a_request_never_pays_more_than_it_reserved(open_accounts):
    accounts = open_accounts(PRICES)
    ann = add_customer(accounts, topped_up="0.000137")
    accounts.reserve(ann, ask("a"))
    accounts.settle([end("a", miss=100, completion=101)])
    assert amounts(accounts, ann) == ("0.00", "0.00", "0.00")
    assert rows(accounts)[0]["completion_tokens"] == 101


def test_release_charges_what_was_noted(open_accounts):
    accounts = open_accounts(PRICES)
    ann = add_customer(accounts, topped_up="1")
    for request_id in ("a", "b"):
        accounts.reserve(ann, ask(request_id))
    assert accounts.note({"a": usage(miss=100, completion=7), "gone": usage(miss=1)}) == ["gone"]
    assert accounts.release(["a", "b"], "abort") == 2
    found = [(row["request_id"], row["completion_tokens"], row["cost_pico"], row["status"]) for row in rows(accounts)]
    assert found == [("a", 7, 100 * 270_000 + 7 * 1_100_000, "abort"), ("b", 0, 0, "abort")]
    assert amounts(accounts, ann)[2] == "0.00"


def test_reservations_of_a_dead_process_lapse_with_its_heartbeat(open_accounts, clock):
    dead, alive = open_accounts(PRICES), open_accounts(PRICES)
    ann = add_customer(dead, topped_up="1")
    dead.reserve(ann, ask("a"))
    dead.note({"a": usage(miss=100, completion=5)})
    clock.seconds += 10
    alive.reserve(ann, ask("b"))
    clock.seconds += 5
    assert alive.sweep() == 0
    clock.seconds += 0.001
    assert alive.sweep() == 1 and alive.sweep() == 0
    (row,) = rows(alive)
    assert (row["request_id"], row["status"], row["completion_tokens"]) == ("a", "lapsed", 5)
    assert amounts(alive, ann) == ("0.00", "0.9999675", "0.000137")  # 100 * 0.27 + 5 * 1.10 = 32.5 per 1M
    assert dead.note({"a": usage(miss=100, completion=9)}) == ["a"]  # it was only paused: it ends the request
    assert dead.settle([end("a", miss=100, completion=9)]) == 0


def test_the_price_is_that_of_the_admission(open_accounts, clock):
    accounts = open_accounts(PRICES)
    ann = add_customer(accounts, topped_up="1")
    price = accounts.reserve(ann, ask("a"))
    accounts.prices = None
    accounts.settle([end("a", miss=10)])
    assert rows(accounts)[0]["cost_pico"] == price.cost_pico(usage(miss=10)) == 2_700_000


def test_a_model_without_a_price_is_refused(open_accounts):
    accounts = open_accounts(PRICES)
    request = ask("a").__class__(request_id="a", model="other", prompt_tokens=1, max_completion_tokens=1)
    with pytest.raises(ConfigError, match="no price for the model 'other'"):
        accounts.reserve(add_customer(accounts, topped_up="1"), request)


def test_a_server_without_prices_costs_nothing_and_writes_the_ledger(open_accounts):
    accounts = open_accounts()
    ann = add_customer(accounts)
    accounts.reserve(ann, ask("a"))
    accounts.settle([end("a", miss=100, completion=7)])
    (row,) = rows(accounts)
    assert (row["cost_pico"], row["price_id"], row["completion_tokens"]) == (0, "free", 7)
    assert accounts.balance(ann.user_id).is_available


@pytest.mark.parametrize("table", [ledger, deposits])
def test_the_ledger_and_the_deposits_are_append_only(open_accounts, table):
    accounts = open_accounts(PRICES)
    ann = add_customer(accounts, topped_up="1")
    accounts.reserve(ann, ask("a"))
    accounts.settle([end("a", miss=1)])
    with accounts.database.read() as connection:
        before = connection.execute(select(table)).mappings().all()
    changes = [update(table).values(id=7), delete(table)]
    if accounts.database.is_sqlite:
        changes.append(insert(table).prefix_with("OR REPLACE").values(before[0]))
    else:
        changes.append(text(f"TRUNCATE {table.name} CASCADE"))
    for change in changes:
        with pytest.raises(DBAPIError, match=f"{table.name} is append-only"), accounts.database.write() as connection:
            connection.execute(change)
    with accounts.database.read() as connection:
        assert connection.execute(select(table)).mappings().all() == before


def test_usage_sums_the_ledger(open_accounts, clock):
    accounts = open_accounts(PRICES)
    ann, bob = add_customer(accounts, topped_up="1"), add_customer(accounts, topped_up="1", name="bob")
    second = accounts.authenticate(accounts.add_key(ann.user_id))
    for day, principal in enumerate((ann, second, bob)):
        accounts.reserve(principal, ask(f"r{day}"))
        accounts.settle([end(f"r{day}", hit=1, miss=10 * day, completion=100, reasoning=10)])
        clock.seconds += 86_400
    by_day = accounts.usage("day")
    assert [row.group for row in by_day] == ["2025-03-01", "2025-03-02", "2025-03-03"]
    assert [row.usage for row in by_day] == [usage(1, 10 * day, 100, 10) for day in range(3)]
    assert [row.requests for row in accounts.usage("key")] == [1, 1, 1]
    assert [(row.group, row.requests) for row in accounts.usage("user")] == [("ann", 2), ("bob", 1)]
    (total,) = accounts.usage("model")
    assert total.usage == usage(3, 30, 300, 30) and total.cost_pico == 3 * 70_000 + 30 * 270_000 + 300 * 1_100_000
    (since,) = accounts.usage("day", ann.user_id, datetime.date(2025, 3, 2))
    assert (since.group, since.requests) == ("2025-03-02", 1)


def test_a_deposit_beyond_what_a_balance_holds_is_refused(open_accounts):
    accounts = open_accounts()
    ann = add_customer(accounts, granted="4000000")
    with pytest.raises(ConfigError, match="holds at most"):
        accounts.deposit(ann.user_id, 4_000_000 * PICO)
    assert amounts(accounts, ann)[:2] == ("4000000.00", "0.00")
