"""Budgets of tokens, time and money, the counts of what was spent, and estimates of the rest."""

import asyncio
import random

import httpx2
import pytest

from tests.endpoint.fake import FakeServer, answer, ask, asks, broken, connect, delta, end, error, sse, streamed
from tests.stopping import StopWhen
from thinkstack.endpoint.budget import Amount, BudgetExceeded
from thinkstack.endpoint.config import EndpointConfig
from thinkstack.endpoint.requests import chat_call
from thinkstack.types import ConfigError, Interrupted


def billed(seed, seconds=1.0, most=100):
    """A server that bills random counts up to the worst case, and its bill: (prompt, cached, completion)."""
    seeded, bill = random.Random(seed), []

    def reply(body, times):
        prompt = seeded.randint(1, WORST - 100)
        bill.append((prompt, seeded.randint(0, prompt), seeded.randint(1, min(body["max_tokens"], most))))
        cached = {"prompt_tokens_details": {"cached_tokens": bill[-1][1]}}
        return answer(prompt_tokens=prompt, completion_tokens=bill[-1][2], **cached)

    return FakeServer(reply, seconds), bill


def cost_of(bill):
    """At the prices of `PRICES`."""
    return sum(((prompt - cached) * 2 + cached * 0.5 + completion * 8) / 1e6 for prompt, cached, completion in bill)


PRICES = {"prompt_price": 2.0, "cached_prompt_price": 0.5, "completion_price": 8.0}
CALL = chat_call(ask("question 0"), EndpointConfig(), "small")
WORST = chat_call(ask("question 10", max_tokens=100), EndpointConfig(), "small").max_prompt_tokens + 100


@pytest.mark.parametrize("seed", range(5))
def test_the_bill_never_exceeds_a_budget_of_tokens_and_uses_it_up_to_one_request(seed):
    server, bill = billed(seed)
    with connect(server, max_tokens_total=60_000, concurrency=16) as endpoint:
        found = []
        with pytest.raises(BudgetExceeded) as raised:
            endpoint.complete(asks(300, max_tokens=100), on_finish=lambda place, completion: found.append(place))
        total = sum(prompt + completion for prompt, _, completion in bill)
        assert 60_000 - WORST < total <= 60_000
        assert endpoint.spent.total_tokens == total and endpoint.spent.requests == len(found) == len(bill)
    assert f"max_tokens_total=60,000 is reached: {total:,} tokens are spent" in str(raised.value)
    assert f"{len(bill)} of 300 requests are finished; raise the budget and run again to go on" in str(raised.value)


@pytest.mark.parametrize("seed", range(5))
def test_the_bill_never_exceeds_a_budget_of_money(seed):
    server, bill = billed(seed)
    budget = 0.05
    with (
        connect(server, max_cost=budget, concurrency=16, **PRICES) as endpoint,
        pytest.raises(BudgetExceeded) as raised,
    ):
        endpoint.complete(asks(300, max_tokens=100))
    assert budget - (WORST * 2 + 100 * 6) / 1e6 < cost_of(bill) <= budget
    assert endpoint.spent.cost == pytest.approx(cost_of(bill), rel=1e-12)
    assert "max_cost=0.05 is reached" in str(raised.value)


def test_a_budget_that_is_just_enough_is_enough():
    server, bill = billed(0)
    requests = asks(20, max_tokens=100)
    with connect(server, max_tokens_total=20 * WORST, concurrency=20) as endpoint:
        assert len(endpoint.complete(requests)) == len(bill) == 20


def test_a_budget_below_one_request_asks_nothing():
    server, bill = billed(0)
    with connect(server, max_tokens_total=WORST // 2) as endpoint, pytest.raises(BudgetExceeded, match="0 tokens are"):
        endpoint.complete(asks(20, max_tokens=100))
    assert bill == []


def test_answers_that_break_off_count_by_the_most_that_they_may_have_cost():
    def reply(body, times):
        parts = [sse(delta(content="x" * 30))] * (2 if times else 1)
        return broken(*parts, httpx2.ReadError("reset")) if times < 2 else answer()

    prompt = WORST - 100
    with connect(FakeServer(reply), retries=5, **PRICES) as endpoint:
        endpoint.complete([ask("question 10", max_tokens=40)])
        spent = endpoint.spent
    assert spent.lost_tokens == (prompt + 30) + (prompt + 40)  # 30 bytes; 60 bytes, of which 40 may be tokens
    assert spent.cost == pytest.approx((2 * prompt * 2 + 70 * 8 + 10 * 2 + 5 * 8) / 1e6)


def test_broken_answers_end_a_run_at_its_budget_and_errors_before_an_answer_cost_nothing():
    server = FakeServer(lambda body, times: broken(sse(delta(content="x")), httpx2.ReadError("reset")))
    with connect(server, retries=1000, max_tokens_total=2000) as endpoint, pytest.raises(BudgetExceeded):
        endpoint.complete([ask()])
    assert 0 < 2000 - endpoint.spent.lost_tokens < WORST
    refused = FakeServer(lambda body, times: error(500) if times < 50 else answer())
    with connect(refused, retries=1000, max_tokens_total=2000) as endpoint:
        endpoint.complete([ask()])
    assert endpoint.spent.total_tokens == 15 and endpoint.spent.lost_tokens == 0


def test_a_reply_without_a_stream_that_never_came_counts_with_max_tokens():
    def reply(body, times):
        if "stream" in body:
            return error(400, "no stream")
        choice = {"message": {"content": "Paris"}, "finish_reason": "stop"}
        return httpx2.Response(200, json={"choices": [choice]}) if times > 3 else httpx2.ReadTimeout("timed out")

    with connect(FakeServer(reply)) as endpoint:
        endpoint.complete([ask("question 10", max_tokens=40)])
        assert endpoint.spent.lost_tokens == 2 * (WORST - 100 + 40)


def test_a_budget_needs_max_tokens_in_each_request():
    with connect(FakeServer(), max_tokens_total=100) as endpoint, pytest.raises(ConfigError, match="needs max_tokens"):
        endpoint.complete([ask(max_tokens=None)])


def test_no_request_starts_when_the_time_is_over_and_the_running_ones_finish():
    server, found = FakeServer(seconds=7.0), []
    with connect(server, max_seconds=20, concurrency=4) as endpoint, pytest.raises(BudgetExceeded) as raised:
        endpoint.complete(asks(100), on_finish=lambda place, completion: found.append(place))
    assert "max_seconds=20 are over; 12 of 100 requests are finished" in str(raised.value)
    assert len(found) == 12 and max(server.times) <= 20


@pytest.mark.parametrize("settings", [{"requests_per_minute": 1}, {"retries": 30}])
def test_time_that_ends_in_a_wait_ends_the_run_then(settings):
    server = FakeServer(lambda body, times: answer() if "requests_per_minute" in settings else error(500))
    with connect(server, max_seconds=90, **settings) as endpoint:
        with pytest.raises(BudgetExceeded, match="max_seconds=90"):
            endpoint.complete(asks(10))
        assert endpoint._loop.time() == pytest.approx(90)


def test_completions_of_an_earlier_run_count_towards_the_budget_but_not_as_spent(tmp_path):
    server, bill = billed(3)
    settings = {"max_tokens_total": 30_000, "cache": str(tmp_path)}
    with connect(server, **settings) as endpoint, pytest.raises(BudgetExceeded):
        endpoint.complete(asks(300, max_tokens=100))
    before = len(bill)
    with connect(server, **settings) as endpoint:
        with pytest.raises(BudgetExceeded, match=f"{before} of 300 requests are finished and kept in"):
            endpoint.complete(asks(300, max_tokens=100))
        assert endpoint.spent.total_tokens == 0 and endpoint.spent.from_cache == before
    assert len(bill) == before
    with connect(server, **settings | {"max_tokens_total": 60_000}) as endpoint, pytest.raises(BudgetExceeded):
        endpoint.complete(asks(300, max_tokens=100))
    assert 60_000 - WORST < sum(prompt + completion for prompt, _, completion in bill) <= 60_000


def test_a_completion_that_is_used_again_counts_once(tmp_path):
    with connect(FakeServer(), cache=str(tmp_path), max_tokens_total=10 * 15 + WORST) as endpoint:
        for _ in range(9):
            endpoint.complete(asks(9, max_tokens=20))
    with connect(FakeServer(), cache=str(tmp_path), max_tokens_total=10 * 15 + WORST) as endpoint:
        for count in (9, 9, 9, 9, 10):
            endpoint.complete(asks(count, max_tokens=20))
        assert endpoint.spent.requests == 1


def test_a_stop_frees_what_was_reserved_and_counts_what_was_cut_off():
    async def parts():
        yield sse(delta(content="x" * 15))
        read.append(1)
        await asyncio.Event().wait()

    read = []
    server, budget = FakeServer(lambda body, times: httpx2.Response(200, content=parts())), 6 * WORST
    with connect(server, max_tokens_total=budget, concurrency=4) as endpoint:
        with pytest.raises(Interrupted):
            endpoint.complete(asks(2), stop=StopWhen(lambda: len(read) == 2))
        lost = 2 * (endpoint._budget.worst_case(CALL).tokens - 20 + 15)
        assert endpoint.spent.lost_tokens == lost
        assert endpoint._budget.missing(Amount(tokens=budget - lost, cost=0.0)) == ""


def test_a_stop_frees_what_was_reserved_by_requests_that_wait_for_their_turn():
    server = FakeServer(lambda body, times: asyncio.Event().wait())
    settings = {"max_tokens_total": 6 * WORST, "concurrency": 4, "requests_per_minute": 1}
    with connect(server, loop=asyncio.new_event_loop(), **settings) as endpoint:  # whose minutes do not pass
        with pytest.raises(Interrupted):
            endpoint.complete(asks(4), stop=StopWhen(lambda: len(server.bodies) == 1))
        assert endpoint._budget.missing(Amount(tokens=6 * WORST, cost=0.0)) == ""


def test_a_cached_price_that_is_not_given_is_that_of_the_prompt():
    def cost(**prices):
        with connect(FakeServer(lambda body, times: answer(prompt_cache_hit_tokens=10)), **prices) as endpoint:
            endpoint.complete([ask()])
            return endpoint.spent.cost

    assert cost(prompt_price=2.0) == pytest.approx(10 * 2.0 / 1e6)
    assert cost(prompt_price=2.0, cached_prompt_price=0.0) == 0


@pytest.mark.parametrize(("concurrency", "spread"), [(4, 0.0), (16, 0.8), (1, 0.5)])
def test_time_and_cost_of_the_rest_are_estimated_within_a_fifth(concurrency, spread):
    seeded, seen = random.Random(7), {}

    async def reply(body, times):
        tokens = round(1000 * (1 + spread * seeded.uniform(-1, 1)))
        await asyncio.sleep(tokens / 50)
        seen[endpoint.spent.requests] = (endpoint._loop.time(), endpoint.spent.cost, endpoint.estimate())
        return answer(completion_tokens=tokens)

    endpoint = connect(FakeServer(reply), concurrency=concurrency, completion_price=8.0)
    with endpoint:
        assert endpoint.estimate() is None
        endpoint.complete(asks(160))
        total_seconds, total_cost = endpoint._loop.time(), endpoint.spent.cost
    for count in (40, 80, 120):
        at, cost, estimate = seen[count]
        assert estimate.requests == 160 - count
        assert estimate.seconds == pytest.approx(total_seconds - at, rel=0.2)
        assert estimate.cost == pytest.approx(total_cost - cost, rel=0.2)


def test_an_estimate_knows_the_limits_per_minute():
    with connect(FakeServer(), requests_per_minute=30) as endpoint:
        endpoint.complete(asks(3))
        assert endpoint.estimate(60).seconds == pytest.approx(120)


def test_estimated_tokens_are_counted_as_such():
    with connect(FakeServer(lambda body, times: streamed(delta(content="Paris"), end()))) as endpoint:
        endpoint.complete(asks(3))
        assert endpoint.spent.num_estimated == 3
