"""Money and limits over HTTP: 402, 429, 403, 401, 503, and a ledger that is the sum of what clients got."""

import concurrent.futures
import json
import random
import sqlite3
from decimal import Decimal

import httpx
import pytest

from tests import HANG_SECONDS
from tests.server.live import live
from tests.server.requests import QUESTION, chunks_of, ledger_rows, post, until
from thinkstack.server.limits import UNLIMITED
from thinkstack.server.prices import PriceTable

ROW = {"input_hit": Decimal("0.27"), "input_miss": Decimal("0.27"), "output": Decimal("1.10")}
PRICES = PriceTable({"currency": "USD", "models": {"deepseek-chat": [ROW], "deepseek-reasoner": [ROW]}})


def answer(prompt, index):
    return "the sum " * 4000 if "endless" in prompt else "Paris, I think.</think>It is Paris."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("data"), answer, prices=PRICES) as running:
        yield running


def customer(server, name, pico=10**15, **values):
    """A user with a balance, and a key."""
    accounts = server.server.accounts
    user_id = accounts.add_user(name)
    if pico:
        accounts.deposit(user_id, pico)
    return user_id, accounts.add_key(user_id, **values)


def test_no_balance_is_a_402_and_the_engine_does_nothing(server):
    _, key = customer(server, "poor", 0)
    before = server.server.models.members["default"].service.status.num_sampled
    response = post(server, key)
    assert (response.status_code, response.json()["error"]["type"]) == (402, "insufficient_balance_error")
    assert "top it up" in response.json()["error"]["message"]
    assert post(server, key, stream=True).status_code == 402
    assert server.server.models.members["default"].service.status.num_sampled == before


def test_parallel_requests_on_a_balance_for_one_are_one_200_and_402s(server):
    body = {"messages": [{"role": "user", "content": "endless"}], "max_tokens": 20}
    _, rich = customer(server, "rich")
    cost = post(server, rich, **body).json()["usage"]
    pico = cost["prompt_tokens"] * 270_000 + 20 * 1_100_000
    user_id, key = customer(server, "one", pico)
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda _: post(server, key, **body).status_code, range(16)))
    assert sorted(found) == [200] + [402] * 15
    balance = server.server.accounts.balance(user_id)
    assert (balance.total_pico, balance.reserved_pico) == (0, 0)


@pytest.mark.parametrize("whose", ["user", "key"])
def test_a_limit_is_a_429_with_a_time_to_come_back(server, whose):
    limits = {"requests_per_minute": 2}
    user_id, key = customer(server, f"limited-{whose}", limits=limits if whose == "key" else None)
    if whose == "user":
        server.server.accounts.change_user(user_id, **limits)
    assert [post(server, key).status_code for _ in range(2)] == [200, 200]
    response = post(server, key)
    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
    assert 0 < int(response.headers["retry-after"]) <= 30 and "requests_per_minute=2" in response.text


def test_parallel_requests_are_limited(server):
    user_id, key = customer(server, "narrow")
    server.server.accounts.change_user(user_id, concurrency=2)
    body = {"messages": [{"role": "user", "content": "endless"}], "max_tokens": 3000}
    with concurrent.futures.ThreadPoolExecutor() as threads:
        found = [threads.submit(post, server, key, **body) for _ in range(4)]
        assert sorted(each.result().status_code for each in found) == [200, 200, 429, 429]


def test_a_day_has_fifty_deep_think_messages(server):
    user_id, key = customer(server, "thinker")
    server.server.accounts.change_user(user_id, deep_think_per_day=50)
    found = [post(server, key, model="deepseek-reasoner", max_tokens=1).status_code for _ in range(51)]
    assert found == [200] * 50 + [429]
    response = post(server, key, model="deepseek-reasoner")
    assert "deep_think_per_day=50" in response.text and 0 < int(response.headers["retry-after"]) <= 86_400
    assert post(server, key).status_code == 200  # without thinking


def test_a_key_for_other_models_is_a_403(server):
    _, key = customer(server, "narrow-minded", models=("deepseek-reasoner",))
    assert post(server, key).status_code == 403
    assert post(server, key, model="deepseek-reasoner").status_code == 200
    rows = httpx.get(f"{server.url}/models", headers={"Authorization": f"Bearer {key}"}).json()["data"]
    assert [row["id"] for row in rows] == ["deepseek-reasoner"]


def test_a_user_who_is_disabled_gets_401_on_an_open_connection(server):
    user_id, key = customer(server, "gone")
    with httpx.Client(headers={"Authorization": f"Bearer {key}"}) as client:
        body = {"model": "deepseek-chat", "messages": QUESTION}
        assert client.post(f"{server.url}/chat/completions", json=body).status_code == 200
        server.server.accounts.change_user(user_id, disabled=True)
        until(
            lambda: client.post(f"{server.url}/chat/completions", json=body).status_code == 401
        )  # keys are read again
        response = client.post(f"{server.url}/chat/completions", json=body)
        assert "disabled" in response.json()["error"]["message"]
        server.server.accounts.change_user(user_id, disabled=False)
        assert client.post(f"{server.url}/chat/completions", json=body).status_code == 200


def test_a_locked_database_is_a_503_and_running_requests_go_on(tmp_path):
    with (
        live(tmp_path, answer, prices=PRICES, database_timeout=0.1) as server,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        _, key = customer(server, "ann")
        assert post(server, key).status_code == 200
        service = server.server.models.members["default"].service
        body = {"messages": [{"role": "user", "content": "endless"}], "max_tokens": 5000, "stream": True}
        running = threads.submit(post, server, key, **body, stream_options={"include_usage": True})
        until(lambda: service.status.running == 1)
        with sqlite3.connect(tmp_path / "accounts.sqlite3", isolation_level=None) as other:
            other.execute("BEGIN IMMEDIATE")
            response = post(server, key)
            assert (response.status_code, response.json()["error"]["type"]) == (503, "overloaded_error")
            assert int(response.headers["retry-after"]) > 0
            assert httpx.get(f"{server.url}/health").status_code == 200
            text = running.result().text
            other.execute("ROLLBACK")
        assert chunks_of(text)[-1]["usage"]["completion_tokens"] == 5000 and text.endswith("data: [DONE]\n\n")
        assert post(server, key).status_code == 200
        until(lambda: sorted(row["completion_tokens"] for row in ledger_rows(server))[-1] == 5000)


def random_request(server, key, seed):
    """One request of a random kind, and what the client knows about it: (kind, id, usage or None)."""
    choose = random.Random(seed)
    kind = choose.choice(["stop", "length", "stop string", "refused", "unknown", "disconnect"])
    model = choose.choice(["deepseek-chat", "deepseek-reasoner"])
    body = {"model": model, "messages": [{"role": "user", "content": f"{choose.randrange(9)} " * 80}]}
    body |= {"n": choose.choice([1, 1, 3])} if kind != "disconnect" else {}
    body |= {"stop": "is"} if kind == "stop string" else {}
    body |= {"max_tokens": choose.randint(1, 6)} if kind == "length" else {}
    body |= {"max_tokens": 10**6} if kind == "refused" else {}
    body |= {"model": "nothing"} if kind == "unknown" else {}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    if kind == "disconnect":
        body |= {"messages": [{"role": "user", "content": "endless"}], "max_tokens": 6000} | stream
        headers = {"Authorization": f"Bearer {key}"}
        url, found = f"{server.url}/chat/completions", 0
        with httpx.stream("POST", url, json=body, headers=headers, timeout=HANG_SECONDS) as response:
            if response.status_code != 200:
                return "overloaded", None, None
            lines = response.iter_lines()
            while found < choose.choice([0, 1, 30]):
                found += next(lines).startswith("data: {")
            return kind, response.headers["x-request-id"], None
    response = post(server, key, **body, **(stream if choose.random() < 0.5 else {}))
    if response.status_code != 200:
        return kind if response.status_code == 400 else "overloaded", None, None
    reply = response.json() if "json" in response.headers["content-type"] else chunks_of(response.text)[-1]
    return kind, reply["id"], reply["usage"]


def test_the_ledger_is_the_sum_of_what_clients_got(tmp_path):
    with live(tmp_path, answer, prices=PRICES, limits=UNLIMITED, max_num_seqs=6, max_waiting=4) as server:
        user_id, key = customer(server, "ann", 10**15)
        with concurrent.futures.ThreadPoolExecutor(12) as threads:
            found = list(threads.map(lambda seed: random_request(server, key, seed), range(200)))
        until(lambda: not server.server.turns)
        until(lambda: server.server.accounts.balance(user_id).reserved_pico == 0)
        rows = {row["request_id"]: row for row in ledger_rows(server)}
        kinds = [kind for kind, _, _ in found]
        assert {"stop", "length", "stop string", "refused", "unknown", "disconnect"} <= set(kinds), set(kinds)
        for kind, request_id, usage in found:
            if usage is not None:
                row = rows.pop(request_id)
                assert row["completion_tokens"] == usage["completion_tokens"], kind
                assert row["prompt_cache_hit_tokens"] == usage["prompt_cache_hit_tokens"], kind
                assert row["prompt_cache_miss_tokens"] == usage["prompt_cache_miss_tokens"], kind
                assert row["reasoning_tokens"] == usage["completion_tokens_details"]["reasoning_tokens"], kind
            elif request_id is not None:
                row = rows.pop(request_id)
                assert row["completion_tokens"] <= 6000 and row["status"] in ("abort", "length")
        assert all(row["status"] == "refused" and row["cost_pico"] == 0 for row in rows.values()), "overloaded"
        assert len(rows) == kinds.count("overloaded")
        spent = sum(row["cost_pico"] for row in ledger_rows(server))
        assert server.server.accounts.balance(user_id).total_pico == 10**15 - spent


def test_a_refused_request_is_free(server):
    user_id, key = customer(server, "careful")
    response = post(server, key, max_tokens=10**6)
    assert response.status_code == 400 and json.loads(response.text)["error"]["param"] == "max_tokens"
    assert server.server.accounts.balance(user_id).total_pico == 10**15
