"""Failures of a server: what is tried again and when, what stops a run, and that nothing says the key."""

import asyncio
import email.utils
import logging
import time
import traceback

import httpx2
import pytest

from tests.endpoint.fake import (
    KEY,
    FakeServer,
    answer,
    answered,
    ask,
    asks,
    broken,
    connect,
    delta,
    end,
    error,
    sse,
    streamed,
)
from thinkstack.config import build
from thinkstack.endpoint.config import EndpointConfig
from thinkstack.endpoint.pacing import backoff_seconds
from thinkstack.types import ConfigError, RequestError


def failing(count, failure):
    """A server that fails so many times for each prompt, and answers then."""

    def reply(body, times):
        made = failure() if callable(failure) else failure
        return made if times < count else answer()

    return FakeServer(reply)


def message_of(server, requests=None, **settings):
    """The error of a run."""
    with connect(server, **settings) as endpoint, pytest.raises(RequestError) as raised:
        endpoint.complete(requests or [ask()])
    assert KEY not in "".join(traceback.format_exception(raised.value))
    return str(raised.value)


TRANSIENT = {
    "timeout 408": lambda: error(408),
    "conflict 409": lambda: error(409),
    "limit 429": lambda: error(429),
    "error 500": lambda: error(500),
    "gateway 502 in HTML": lambda: httpx2.Response(502, text="<html>Bad gateway</html>"),
    "overloaded 503": lambda: httpx2.Response(503),
    "refused": lambda: httpx2.ConnectError("refused"),
    "no answer": lambda: httpx2.ReadTimeout("timed out"),
    "reset": lambda: httpx2.ReadError("reset by peer"),
    "hung up": lambda: httpx2.RemoteProtocolError("server disconnected without sending a response"),
    "half a stream": lambda: broken(sse(delta(content="Par")), httpx2.ReadError("reset")),
    "half a line": lambda: broken(sse(delta(content="Par")), b'data: {"choices": [{"del'),
    "no end": lambda: streamed(delta(content="Par")),
    "empty": lambda: httpx2.Response(200),
    "garbage": lambda: httpx2.Response(200, text="data: {garbage\n\n"),
    "garbage of the right form": lambda: streamed({"choices": [7]}),
    "not UTF-8": lambda: broken(b'data: {"choices": [{"delta": {"content": "\xff"}}]}\n', sse(end())),
    "HTML": lambda: httpx2.Response(200, text="<html>Welcome</html>"),
    "half a JSON object": lambda: httpx2.Response(200, text='{"choices": [{"mess'),
    "error in the stream": lambda: streamed(delta(content="Par"), {"error": {"message": "died"}}),
    "error 500 with status 200": lambda: httpx2.Response(200, json={"error": {"message": "died", "code": 500}}),
    "given up by the server": lambda: streamed(delta(content="Par"), end("insufficient_system_resource")),
}


@pytest.mark.parametrize("failure", TRANSIENT.values(), ids=TRANSIENT)
def test_a_failure_that_may_pass_is_tried_again(failure):
    server = failing(2, failure)
    with connect(server) as endpoint:
        (found,) = endpoint.complete([ask()])
        assert (found.content, found.attempts) == ("Paris", 3)
        assert (endpoint.spent.retries, endpoint.spent.failures, endpoint.spent.requests) == (2, 0, 1)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (error(400, "max_tokens is\ntoo large"), "max_tokens is too large (status 400)"),
        (error(401, f"incorrect key {KEY}"), "incorrect key [key] (status 401); set OPENAI_API_KEY"),
        (error(402, "no balance"), "no balance (status 402); add credit"),
        (error(403, "not yours"), "(status 403); the key may lack"),
        (error(404, "no such model"), "no such model (status 404); the address of most servers ends in /v1"),
        (error(422, "bad field"), "bad field (status 422)"),
        (httpx2.Response(307, headers={"Location": "https://host"}), "(status 307); give the address that it"),
        (error(429, "quota", code="insufficient_quota"), "(status 429); add credit"),
        (streamed({"error": {"message": "too long", "code": 400}}), "the server ended the answer: too long"),
    ],
)
def test_a_failure_that_does_not_pass_stops_at_once_with_the_message_and_the_way_out(reply, words):
    server = FakeServer(lambda body, times: reply)
    message = message_of(server, asks(20), concurrency=1)
    assert words in message and "0 of 20 requests are finished; run again to go on" in message
    assert len(server.bodies) == 1


def test_running_requests_finish_when_another_one_stops_the_run():
    def reply(body, times):
        return error(400, "too long") if body["messages"][-1]["content"] == "question 2" else answer()

    async def slow(body, times):
        await asyncio.sleep(30 if body["messages"][-1]["content"] != "question 2" else 1)
        return reply(body, times)

    server, found = FakeServer(slow), []
    with connect(server, concurrency=4) as endpoint, pytest.raises(RequestError, match=r"too long .* 3 of 20"):
        endpoint.complete(asks(20), on_finish=lambda place, completion: found.append(place))
    assert sorted(found) == [0, 1, 3] and len(server.bodies) == 4


def test_waits_double_up_to_the_maximum_and_differ_by_request_and_repeat_by_seed():
    waits = [backoff_seconds(attempt, 0.0, 60.0, "key") for attempt in range(1, 12)]
    for attempt, wait in enumerate(waits):
        full = min(60.0, 0.5 * 2**attempt)
        assert full / 2 <= wait <= full
    assert waits == [backoff_seconds(attempt, 0.0, 60.0, "key") for attempt in range(1, 12)]
    assert len({backoff_seconds(9, 0.0, 60.0, f"key {number}") for number in range(50)}) == 50
    assert 30 <= backoff_seconds(1, 30.0, 60.0, "key") <= 33
    assert 90 <= backoff_seconds(10**6, 90.0, 60.0, "key") <= 99


def test_the_server_is_given_the_time_between_attempts():
    server = failing(4, lambda: error(500))
    assert answered(connect(server), [ask()]) == ["Paris"]
    gaps = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert all(0.25 * 2**n <= gap <= 0.5 * 2**n for n, gap in enumerate(gaps))


@pytest.mark.parametrize("headers", [{"Retry-After": "20"}, {"retry-after-ms": "20000"}, "date"])
def test_a_storm_of_429_ends_when_all_requests_wait_as_long_as_the_server_says(headers):
    if headers == "date":
        headers = {"Retry-After": email.utils.formatdate(time.time() + 21, usegmt=True)}
    storm = 40.0

    def reply(body, times):
        is_early = server.times[-1] < storm
        return error(429, "slow down", headers) if is_early else answer()

    server = FakeServer(reply)
    assert answered(connect(server, concurrency=50), asks(200)) == ["Paris"] * 200
    early = [at for at in server.times if at < storm]
    assert len(early) <= 150 and not [at for at in early if 0.1 < at < 18.9]  # no more than three waves of 50


def test_a_server_that_asks_to_wait_for_hours_ends_the_run():
    message = message_of(FakeServer(lambda body, times: error(429, "daily limit", {"Retry-After": "50000"})))
    assert "daily limit (status 429); it asks to wait 50,000 s" in message


@pytest.mark.parametrize("wait", ["soon", "nan", "-5", "inf", ""])
def test_a_retry_after_without_meaning_is_ignored(wait):
    server = failing(1, lambda: error(429, headers={"Retry-After": wait}))
    assert answered(connect(server), [ask()]) == ["Paris"]
    assert server.times[1] < 1


def test_a_server_that_dies_ends_the_run_early_and_what_finished_was_reported():
    is_dead = False

    def reply(body, times):
        nonlocal is_dead
        is_dead |= len(server.bodies) > 50
        return httpx2.ConnectError("connection refused") if is_dead else answer()

    server, found = FakeServer(reply), []
    with connect(server, retries=5) as endpoint, pytest.raises(RequestError) as raised:
        endpoint.complete(asks(1000), on_finish=lambda place, completion: found.append(place))
    assert "no request was answered during 6 attempts; 50 of 1,000 requests are finished" in str(raised.value)
    assert len(found) == 50 and len(server.bodies) <= 50 + 8 * 6


def test_a_server_that_was_never_there_ends_the_run_in_seconds():
    server = FakeServer(lambda body, times: httpx2.ConnectError("connection refused"))
    assert "cannot reach http://host:8000/v1: connection refused; check that" in message_of(server, asks(100))
    assert server.times[-1] < 5


def test_a_server_that_restarts_is_waited_for():
    server = FakeServer(lambda body, times: httpx2.ConnectError("") if 5 < server.times[-1] < 60 else answer(), 1.0)
    assert answered(connect(server), asks(200)) == ["Paris"] * 200


def test_a_request_that_always_fails_does_not_stop_the_others():
    def reply(body, times):
        return error(500, "it is poison") if body["messages"][-1]["content"] == "question 3" else answer()

    server, found = FakeServer(reply, seconds=1.0), []
    with connect(server, retries=2) as endpoint, pytest.raises(RequestError) as raised:
        endpoint.complete(asks(100), on_finish=lambda place, completion: found.append(place))
    assert "1 requests failed for good (http://host:8000/v1: it is poison (status 500)); 99 of 100" in str(raised.value)
    assert len(found) == 99 and server.asked["question 3"] == 3
    assert endpoint.spent.failures == 1


def refuses(*numbers):
    """A server that refuses these questions as too long."""
    poison = {f"question {number}" for number in numbers}

    def reply(body, times):
        return error(400, "too long") if body["messages"][-1]["content"] in poison else answer()

    return FakeServer(reply)


@pytest.mark.parametrize("concurrency", [1, 8])
def test_a_refused_request_is_left_out_where_the_caller_accepts_it(concurrency, tmp_path):
    """Regression: one prompt that was too long ended each run of an evaluation, and each resumed one."""
    server = refuses(0, 7)
    with connect(server, concurrency=concurrency, cache=str(tmp_path)) as endpoint:
        found = endpoint.complete(asks(20), accept_refusals=True)
    assert [place for place, one in enumerate(found) if one.finish_reason == "refused"] == [0, 7]
    assert found[0].content == "http://host:8000/v1: too long (status 400)" and found[0].completion_tokens == 0
    assert found[0].reasoning is None
    with connect(server, cache=str(tmp_path), opens_thinking=True) as endpoint:
        again = endpoint.complete(asks(20), accept_refusals=True)
    assert [one.finish_reason for one in again] == [one.finish_reason for one in found]
    assert again[0].content == found[0].content
    assert (len(server.bodies), server.asked["question 0"]) == (22, 2)  # refusals are not kept


def test_a_server_that_refuses_everything_ends_the_run():
    server = refuses(*range(40))
    with connect(server, concurrency=1) as endpoint, pytest.raises(RequestError, match=r"too long .*0 of 40 requests"):
        endpoint.complete(asks(40), accept_refusals=True)
    assert len(server.bodies) == 8
    with connect(refuses(0), concurrency=1) as endpoint, pytest.raises(RequestError, match="0 of 1 requests"):
        endpoint.complete(asks(1), accept_refusals=True)


def test_a_request_that_always_fails_while_the_others_think_for_long_does_not_stop_them():
    async def reply(body, times):
        is_poison = body["messages"][-1]["content"] == "question 3"
        await asyncio.sleep(0 if is_poison else 10_000)
        return error(500, "it is poison") if is_poison else answer()

    server, found = FakeServer(reply), []
    with connect(server, retries=2) as endpoint, pytest.raises(RequestError, match=r"1 requests failed .*; 29 of 30"):
        endpoint.complete(asks(30), on_finish=lambda place, completion: found.append(place))


def test_a_server_whose_answers_all_break_off_ends_the_run_early():
    async def reply(body, times):
        await asyncio.sleep(1)
        return broken(sse(delta(content="Par")), httpx2.ReadError("reset"))

    server = FakeServer(reply)
    message = message_of(server, asks(1000), retries=2, concurrency=4)
    assert "no request was answered during 3 attempts; 0 of 1,000" in message and len(server.bodies) <= 3 * 8


def test_an_attempt_that_takes_too_long_is_tried_again():
    server = FakeServer(lambda body, times: answer())

    async def reply(body, times):
        await asyncio.sleep(0 if times else 1000)
        return answer()

    server.reply = reply
    assert answered(connect(server, max_request_seconds=60), [ask()]) == ["Paris"]
    assert 60 <= server.times[1] <= 61


def test_an_endless_answer_is_an_error(monkeypatch):
    monkeypatch.setattr("thinkstack.endpoint.reply.MAX_REPLY_BYTES", 10_000)
    server = FakeServer(lambda body, times: broken(*[b"x" * 1000] * 100))
    assert "sends an endless answer: over 10,000 bytes" in message_of(server)


def test_an_error_of_the_callback_ends_the_running_requests():
    def fail(place, completion):
        raise KeyError("mine")

    async def reply(body, times):
        await asyncio.sleep(0 if body["messages"][-1]["content"] == "question 0" else 10**6)
        return answer()

    server = FakeServer(reply)
    with connect(server, concurrency=3) as endpoint, pytest.raises(KeyError, match="mine"):
        endpoint.complete(asks(9), on_finish=fail)
    assert server.running == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": ""}, "endpoint.url is not set"),
        ({"url": "host:8000"}, "write it as http://host:port/v1"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE has no key for host"),
        ({"extra_body": {"messages": []}}, "extra_body.messages is set by the client"),
        ({"extra_body": {"x": {1, 2}}}, "extra_body cannot be sent as JSON"),
        ({"max_cost": 1.0}, "max_cost=1 needs prices"),
    ],
)
def test_a_wrong_setting_has_an_error_with_a_way_out(settings, words):
    with pytest.raises(ConfigError, match=words):
        connect(FakeServer(), api_key="", **settings)


def test_settings_come_from_a_table():
    cfg = build(EndpointConfig, {"url": "http://host/v1", "extra_body": {"top_k": 5}, "thinking": True}, "endpoint")
    assert cfg == EndpointConfig(url="http://host/v1", extra_body={"top_k": 5}, thinking=True)
    with pytest.raises(ConfigError, match=r"unknown key endpoint.concurency; did you mean endpoint.concurrency\?"):
        build(EndpointConfig, {"concurency": 3}, "endpoint")


@pytest.mark.parametrize(
    ("request_fields", "words"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"stop": "END"}, "stop='END' must be a tuple"),
        ({"stop": ("",)}, "stop="),
    ],
)
def test_a_wrong_request_has_an_error(request_fields, words):
    with pytest.raises(RequestError, match=words):
        ask(**request_fields)


def test_half_of_a_character_cannot_be_sent():
    with connect(server := FakeServer()) as endpoint, pytest.raises(RequestError, match=r"\\ud83d, half of a char"):
        endpoint.complete([ask("\ud83d")])
    assert server.bodies == []


@pytest.mark.parametrize(
    ("settings", "environment"),
    [
        ({"api_key_env": KEY}, ""),
        ({"url": f"http://user:{KEY}@host/v1"}, ""),
        ({"url": f"http://host/v1?key={KEY}"}, ""),
        ({}, f"two {KEY}\nlines"),
        ({"api_key_env": "SOME_KEY"}, f"k\u00e9y{KEY}"),
    ],
)
def test_a_key_in_the_wrong_place_is_not_said(settings, environment, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", environment)
    monkeypatch.setenv("SOME_KEY", environment)
    with pytest.raises(ConfigError) as raised:
        connect(FakeServer(), api_key="", **settings)
    assert KEY not in "".join(traceback.format_exception(raised.value))


def test_a_key_is_in_no_log_line_and_in_no_file(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    server = failing(2, lambda: error(500, f"your key {KEY} is fine"))
    with connect(server, cache=str(tmp_path)) as endpoint:
        endpoint.complete([ask()])
    assert "your key [key] is fine" in caplog.text and KEY not in caplog.text
    assert all(KEY not in path.read_text() for path in tmp_path.iterdir())
    assert server.requests[-1].headers["Authorization"] == f"Bearer {KEY}"
