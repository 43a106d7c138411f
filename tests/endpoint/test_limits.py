"""Requests side by side, limits per minute, and a stop that keeps what finished."""

import asyncio
import os
import signal
import threading
import time

import pytest

from tests.endpoint.fake import FakeServer, answer, answered, ask, asks, connect, error
from tests.stopping import StopWhen
from thinkstack.stopping import stopping_on_signals
from thinkstack.types import Interrupted, RequestError


def test_as_many_requests_run_as_are_allowed():
    server = FakeServer(seconds=2.0)
    endpoint = connect(server, concurrency=7)
    assert answered(endpoint, asks(70)) == ["Paris"] * 70
    assert server.most_running == 7 and server.times[-1] == pytest.approx(18.0)


def test_completions_have_the_order_of_their_requests_and_are_reported_in_that_of_their_ends():
    async def reply(body, times):
        number = int(body["messages"][-1]["content"].split()[-1])
        await asyncio.sleep(10 - number)
        return answer(f"answer {number}")

    found = []
    with connect(FakeServer(reply)) as endpoint:
        completions = endpoint.complete(asks(8), lambda place, completion: found.append((place, completion.content)))
    assert [completion.content for completion in completions] == [f"answer {number}" for number in range(8)]
    assert found == [(number, f"answer {number}") for number in reversed(range(8))]


def test_equal_requests_are_asked_once_and_samples_differ_by_their_index():
    server, found = FakeServer(), []
    with connect(server) as endpoint:
        requests = [ask("same"), ask("same"), ask("same", index=1), ask("same", seed=1)]
        endpoint.complete(requests, on_finish=lambda place, completion: found.append(place))
    assert len(server.bodies) == 3 and sorted(found) == [0, 1, 2, 3]


def test_no_minute_has_more_requests_than_the_limit():
    server = FakeServer(seconds=1.0)
    assert answered(connect(server, requests_per_minute=90, concurrency=40), asks(200)) == ["Paris"] * 200
    for start in server.times:
        assert sum(start <= at < start + 59.999 for at in server.times) <= 90
    assert server.times[-1] == pytest.approx(199 * 60 / 90)


def test_tokens_per_minute_count_what_was_used():
    used = 500  # of the 2,000 that each may take
    server = FakeServer(lambda body, times: answer(prompt_tokens=100, completion_tokens=used - 100), seconds=1.0)
    assert answered(connect(server, tokens_per_minute=6000), asks(100, max_tokens=2000)) == ["Paris"] * 100
    for start in server.times:
        assert sum(start <= at < start + 60 for at in server.times) * used <= 6000 + 2400
    assert server.times[-1] < 100 * used * 60 / 6000 * 1.4


def test_retries_count_towards_the_limit():
    server = FakeServer(lambda body, times: answer() if times else error(500))
    assert answered(connect(server, requests_per_minute=60), asks(20)) == ["Paris"] * 20
    assert len(server.times) == 40 and server.times[-1] >= 39


def test_threads_share_the_limits_of_an_endpoint():
    server, found = FakeServer(seconds=1.0), {}
    with connect(server, concurrency=5) as endpoint:

        def work(name):
            found[name] = endpoint.complete([ask(f"{name} {number}") for number in range(20)])

        threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(map(len, found.values())) == [20, 20, 20] and server.most_running == 5


def test_complete_may_be_called_while_an_event_loop_runs():
    async def main():
        return answered(connect(FakeServer()), [ask()])

    assert asyncio.run(main()) == ["Paris"]


def test_nothing_starts_before_the_time_that_the_server_asked_for():
    async def reply(body, times):
        if body["messages"][-1]["content"] == "question 0" and not times:
            return error(429, headers={"Retry-After": "30"})
        await asyncio.sleep(5)
        return answer()

    server = FakeServer(reply)
    assert answered(connect(server, concurrency=2), asks(6)) == ["Paris"] * 6
    assert sorted(at for at in server.times if at > 0)[0] == pytest.approx(30, abs=0.1) and len(server.times) == 7


def test_an_error_ends_the_waits_of_other_requests():
    server = FakeServer(lambda body, times: error(400), seconds=1.0)
    with connect(server, concurrency=3, requests_per_minute=1) as endpoint, pytest.raises(RequestError):
        endpoint.complete(asks(9))
    assert endpoint._loop.time() == 1 and len(server.bodies) == 1


def test_a_running_request_that_fails_after_an_error_of_another_one_is_not_tried_again():
    async def reply(body, times):
        is_first = body["messages"][-1]["content"] == "question 0"
        await asyncio.sleep(1 if is_first else 5)
        return error(400 if is_first else 500)

    with connect(server := FakeServer(reply), concurrency=2) as endpoint, pytest.raises(RequestError, match="400"):
        endpoint.complete(asks(9))
    assert len(server.bodies) == 2


def blocking_server():
    """Answers the first five requests, and no other one."""

    async def reply(body, times):
        if len(server.bodies) > 5:
            await asyncio.Event().wait()
        return answer()

    server = FakeServer(reply)
    return server


def test_a_stop_cancels_what_runs_and_keeps_what_finished(tmp_path):
    server, found = blocking_server(), []
    with connect(server, concurrency=4, cache=str(tmp_path)) as endpoint:
        stop = StopWhen(lambda: len(found) == 5 and server.running == 4)
        with pytest.raises(Interrupted):
            endpoint.complete(asks(50), lambda place, completion: found.append(place), stop)
        assert server.cancelled == 4 and server.running == 0 and len(server.bodies) == 9
    server.reply = lambda body, times: answer()
    assert answered(connect(server, cache=str(tmp_path)), asks(50)) == ["Paris"] * 50
    assert [server.asked[f"question {place}"] for place in found] == [1] * 5


def test_what_finished_before_a_stop_is_reported_although_it_was_not_read_yet():
    server, found = blocking_server(), []

    def has_begun():
        """After the first answer, waits until the last one is there."""
        while 0 < len(server.bodies) <= 5:
            time.sleep(0.001)
        return len(server.bodies) > 5

    with connect(server, concurrency=1) as endpoint, pytest.raises(Interrupted):
        endpoint.complete(asks(50), lambda place, completion: found.append(place), StopWhen(has_begun))
    assert found == [0, 1, 2, 3, 4]


def test_a_stop_before_the_start_asks_nothing():
    with connect(server := FakeServer()) as endpoint, pytest.raises(Interrupted):
        endpoint.complete(asks(5), stop=StopWhen(lambda: True))
    assert server.bodies == []


@pytest.fixture
def python_handles_ctrl_c():
    """A shell lets programs behind "&" ignore SIGINT, and Python then installs no handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_a_run_with_and_without_a_stop_request(python_handles_ctrl_c):
    server, found = blocking_server(), []

    def on_finish(place, completion):
        found.append(place)
        if len(found) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with connect(server) as endpoint, stopping_on_signals() as stop, pytest.raises(Interrupted):
        endpoint.complete(asks(50), on_finish, stop)
    assert server.running == 0
    server, found = blocking_server(), []
    with connect(server) as endpoint, pytest.raises(KeyboardInterrupt):
        endpoint.complete(asks(50), on_finish)
    assert server.running == 0
