"""Limits: what passes, what is refused, and when it may come again. Clocks stand still."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import select, update

from tests.server.billing import add_customer, ask, end
from thinkstack.server.accounts import Accounts
from thinkstack.server.database import Database, sqlite_url, users
from thinkstack.server.errors import RateLimited
from thinkstack.server.limits import (
    DAY_MS,
    UNITS,
    UNLIMITED,
    Demand,
    Limits,
    check_limits,
    limit_parameters,
    limit_update,
)


def limited(**values):
    return dataclasses.replace(UNLIMITED, **values)


def refusal_of(accounts, principal, request):
    with pytest.raises(RateLimited) as refused:
        accounts.reserve(principal, request)
    return refused.value.limit, refused.value.value, refused.value.retry_after_seconds


def test_requests_a_minute_are_a_bucket(open_accounts, clock):
    """Six a minute: one comes back every ten seconds."""
    accounts = open_accounts(limits=limited(requests_per_minute=6))
    ann = add_customer(accounts)
    for number in range(6):
        accounts.reserve(ann, ask(f"r{number}"))
    assert refusal_of(accounts, ann, ask("r6")) == ("requests_per_minute", 6, 10)
    clock.seconds += 9.999
    assert refusal_of(accounts, ann, ask("r6")) == ("requests_per_minute", 6, 1)
    clock.seconds += 0.001
    accounts.reserve(ann, ask("r6"))
    assert refusal_of(accounts, ann, ask("r7")) == ("requests_per_minute", 6, 10)
    clock.seconds += 3600
    for number in range(6):
        accounts.reserve(ann, ask(f"late{number}"))
    assert refusal_of(accounts, ann, ask("late6"))[2] == 10


def test_the_message_says_limit_value_and_time(open_accounts):
    accounts = open_accounts(limits=limited(requests_per_minute=1))
    ann = add_customer(accounts)
    accounts.reserve(ann, ask("a"))
    with pytest.raises(RateLimited, match=r"user ann .* requests_per_minute=1; try again in 0:01:00"):
        accounts.reserve(ann, ask("b"))


def test_prompt_tokens_count_at_once_and_completion_tokens_when_settled(open_accounts, clock):
    accounts = open_accounts(limits=limited(tokens_per_minute=600))
    ann = add_customer(accounts)
    accounts.reserve(ann, ask("a", 300, 100_000))
    assert refusal_of(accounts, ann, ask("b", 301, 1)) == ("tokens_per_minute", 600, 1)
    accounts.reserve(ann, ask("b", 300, 1))
    accounts.settle([end("a", miss=300, completion=1200)])
    assert refusal_of(accounts, ann, ask("c", 600, 1))[2] == 180  # 300 + 300 + 1,200 at ten a second
    clock.seconds += 179
    assert refusal_of(accounts, ann, ask("c", 600, 1))[2] == 1
    clock.seconds += 1
    accounts.reserve(ann, ask("c", 600, 1))


def test_a_prompt_above_the_limit_waits_for_an_empty_bucket(open_accounts, clock):
    accounts = open_accounts(limits=limited(tokens_per_minute=600))
    ann = add_customer(accounts)
    accounts.reserve(ann, ask("a", 1, 1))
    assert refusal_of(accounts, ann, ask("b", 1200, 1))[2] == 1
    clock.seconds += 1
    accounts.reserve(ann, ask("b", 1200, 1))
    assert refusal_of(accounts, ann, ask("c", 600, 1))[2] == 120


def test_concurrency_counts_requests_that_are_not_settled(open_accounts):
    accounts = open_accounts(limits=limited(concurrency=2))
    ann = add_customer(accounts)
    accounts.reserve(ann, ask("a"))
    accounts.reserve(ann, ask("b"))
    assert refusal_of(accounts, ann, ask("c")) == ("concurrency", 2, 1)
    accounts.release(["a"])
    accounts.reserve(ann, ask("c"))


def test_deep_think_messages_count_by_utc_day(open_accounts, clock):
    accounts = open_accounts(limits=limited(deep_think_per_day=2))
    ann = add_customer(accounts)
    for request_id in ("a", "b"):
        accounts.reserve(ann, ask(request_id, deep_think=True))
    assert refusal_of(accounts, ann, ask("c", deep_think=True)) == ("deep_think_per_day", 2, 12 * 3600)
    accounts.reserve(ann, ask("c"))
    clock.seconds += 12 * 3600
    accounts.reserve(ann, ask("d", deep_think=True))


def test_a_refused_request_takes_nothing_from_the_other_limits(open_accounts):
    accounts = open_accounts(limits=limited(requests_per_minute=3, concurrency=1))
    ann = add_customer(accounts)
    accounts.reserve(ann, ask("a"))
    for _ in range(5):
        assert refusal_of(accounts, ann, ask("b"))[0] == "concurrency"
    accounts.release(["a"])
    accounts.reserve(ann, ask("b"))
    accounts.release(["b"])
    accounts.reserve(ann, ask("c"))
    accounts.release(["c"])
    assert refusal_of(accounts, ann, ask("d"))[0] == "requests_per_minute"


@pytest.mark.parametrize("name", ["requests_per_minute", "concurrency", "deep_think_per_day"])
def test_a_key_has_limits_beside_those_of_its_user(open_accounts, name):
    accounts = open_accounts()
    small = add_customer(accounts, limits={name: 1})
    large = accounts.authenticate(accounts.add_key(small.user_id))
    accounts.reserve(small, ask("a", deep_think=True))
    assert refusal_of(accounts, small, ask("b", deep_think=True))[:2] == (name, 1)
    accounts.reserve(large, ask("b", deep_think=True))


def test_completion_tokens_count_for_the_key_too(open_accounts):
    accounts = open_accounts()
    ann = add_customer(accounts, limits={"tokens_per_minute": 600})
    accounts.reserve(ann, ask("a", 10, 1000))
    accounts.settle([end("a", miss=10, completion=590)])
    assert refusal_of(accounts, ann, ask("b", 1, 1)) == ("tokens_per_minute", 600, 1)


def test_limits_of_a_user_hold_over_all_keys(open_accounts):
    accounts = open_accounts(limits=limited(requests_per_minute=1))
    first = add_customer(accounts)
    second = accounts.authenticate(accounts.add_key(first.user_id))
    accounts.reserve(first, ask("a"))
    assert refusal_of(accounts, second, ask("b"))[0] == "requests_per_minute"


def test_a_limit_that_is_set_later_knows_no_debt(open_accounts):
    accounts = open_accounts()
    ann = add_customer(accounts)
    accounts.reserve(ann, ask("a", 10**9, 10**9))
    accounts.settle([end("a", miss=10**9, completion=10**9)])
    accounts.reserve(ann, ask("b"))
    accounts.change_user(ann.user_id, tokens_per_minute=600)
    ann = accounts.authenticate(accounts.add_key(ann.user_id))
    accounts.reserve(ann, ask("c"))


def test_a_clock_that_goes_back_neither_fills_nor_empties_a_bucket(open_accounts, clock):
    accounts = open_accounts(limits=limited(requests_per_minute=1))
    ann = add_customer(accounts)
    accounts.reserve(ann, ask("a"))
    clock.seconds -= 3600
    assert refusal_of(accounts, ann, ask("b"))[2] == 60


def test_the_largest_limits_do_not_overflow(open_accounts, clock):
    accounts = open_accounts(limits=limited(requests_per_minute=2**31 - 1, tokens_per_minute=2**31 - 1))
    ann = add_customer(accounts)
    for request_id in ("a", "b"):
        accounts.reserve(ann, ask(request_id, 10**9, 10**9))
        accounts.settle([end(request_id, miss=10**9, completion=10**9)])
        clock.seconds += 10**7
    assert accounts.list_users()[0]["tokens_used"] == 2 * 10**9 * 60_000


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A database with one user, and its id."""
    database = Database(sqlite_url(tmp_path_factory.mktemp("accounts")))
    yield database, Accounts(database).add_user("ann")
    database.close()


LIMIT = st.sampled_from((0, 1, 7, 600, 2**31 - 1))
NOW_MS = 20_000 * DAY_MS + 5


@hypothesis_settings(max_examples=100, deadline=None)
@given(
    limits=st.builds(Limits, requests_per_minute=LIMIT, tokens_per_minute=LIMIT, deep_think_per_day=LIMIT),
    used=st.tuples(st.integers(0, 1300), st.integers(0, 1300), st.integers(0, 8)),
    parts=st.integers(-1, 1),
    age_ms=st.sampled_from((-5, 0, 1, 99, 100, 60_000, DAY_MS, 9 * DAY_MS)),
    tokens=st.integers(0, 1300),
    deep_think=st.booleans(),
)
def test_what_the_update_refuses_has_a_reason(user, limits, used, parts, age_ms, tokens, deep_think):
    """The condition in SQL and the explanation in Python are the same."""
    database, user_id = user
    demand = Demand(now_ms=NOW_MS, prompt_tokens=tokens, deep_think=deep_think)
    row = {
        "requests_used": max(0, used[0] * UNITS + parts),
        "tokens_used": max(0, used[1] * UNITS + parts),
        "deep_think_used": used[2],
        "deep_think_day": (NOW_MS - age_ms) // DAY_MS,
        "limits_ms": NOW_MS - age_ms,
    }
    limited_names, values = limit_parameters(limits, demand)
    with database.write() as connection:
        connection.execute(update(users).where(users.c.id == user_id).values(row))
        passed = connection.execute(limit_update(users, limited_names), values | {"id_": user_id}).rowcount == 1
        found = connection.execute(select(users)).mappings().one()
    if passed:
        check_limits(row, limits, demand, "ann")
        assert found["limits_ms"] == max(NOW_MS, row["limits_ms"])
    else:
        with pytest.raises(RateLimited) as refused:
            check_limits(row, limits, demand, "ann")
        assert refused.value.retry_after_seconds > 0
