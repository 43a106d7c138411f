"""Processes on real sockets: killed ones resume, two share a cache, and our own server answers."""

import random
from dataclasses import replace

import pytest

from tests import HANG_SECONDS
from tests.endpoint.sockets import counting_server, start
from tests.server.live import live
from tests.server.process import save_tiny, serve
from tests.server.requests import until
from tests.stopping import StopWhen
from thinkstack.endpoint.config import EndpointConfig
from thinkstack.endpoint.endpoint import Endpoint
from thinkstack.endpoint.requests import EndpointRequest
from thinkstack.types import Interrupted, Message, RequestError


def note(lines, reported):
    """Note reported answers; one that was reported before must be the same."""
    for line in lines:
        place, _, text = line.rstrip("\n").partition(" ")
        assert reported.setdefault(place, text) == text


def run_with_kills(folder, kills, count, seconds, seed):
    """Kill a run so many times, each after a random number of new answers, and then let it end.

    Every answer says how often its question was asked: the one that is reported stays the last one.
    """
    seeded, reported = random.Random(seed), {}
    with counting_server(seconds) as server:
        for _ in range(kills):
            process = start(server, folder, count)
            goal = len(reported) + seeded.randint(1, count // kills)
            for line in process.stdout:
                note([line], reported)
                if len(reported) >= goal:
                    break
            process.kill()
            note(process.stdout, reported)  # not `communicate`, which leaves out what was read ahead
            process.wait()
            until(lambda: server.connections == 0)
        last = start(server, folder, count)
        note(last.communicate(timeout=HANG_SECONDS)[0].splitlines(), reported)
        assert last.returncode == 0
        assert reported == {str(place): f"answer {server.asked[f'question {place}']} 你好" for place in range(count)}
        assert sum(server.asked.values()) <= count + kills * EndpointConfig().concurrency


def test_a_run_that_is_killed_five_times_asks_nothing_again_that_it_reported(tmp_path):
    run_with_kills(tmp_path, kills=5, count=100, seconds=0.01, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_is_killed_twenty_times_asks_nothing_again_that_it_reported(tmp_path, seed):
    run_with_kills(tmp_path, kills=20, count=400, seconds=0.01 * seed, seed=seed)


def test_two_processes_share_a_cache(tmp_path):
    with counting_server(0.005) as server:
        pair = [start(server, tmp_path, 200) for _ in range(2)]
        for process in pair:
            assert len(process.communicate(timeout=HANG_SECONDS)[0].splitlines()) == 200
            assert process.returncode == 0
        asked = sum(server.asked.values())
        requests, found = [ask(f"question {number}", max_tokens=20) for number in range(200)], []
        for _ in range(2):
            with Endpoint(EndpointConfig(url=server.url, model="small", cache=str(tmp_path))) as endpoint:
                found.append([one.content for one in endpoint.complete(requests)])
        assert sum(server.asked.values()) == asked and found[0] == found[1]


def ask(text, **fields):
    return EndpointRequest(messages=(Message(role="user", content=text),), **{"max_tokens": 50} | fields)


def scripted(prompt, index):
    """By the question in the prompt."""
    if "endless" in prompt:
        return "word " * 4000
    return "the sum is 3</think>It is 3. 你好 🙂" if "sum" in prompt else "I know.</think>Paris"


def test_our_server_answers_with_thinking_usage_and_a_cached_prompt(tmp_path):
    with live(tmp_path, scripted) as server:
        cfg = EndpointConfig(url=server.url, thinking=True, concurrency=4)
        with Endpoint(cfg, server.key) as endpoint:
            assert endpoint.model in endpoint.list_models()
            found = endpoint.complete([ask("the sum of 1 and 2", index=index, seed=index) for index in range(12)])
            assert {(one.reasoning, one.content) for one in found} == {("the sum is 3", "It is 3. 你好 🙂")}
            assert {one.finish_reason for one in found} == {"stop"} and not any(one.is_estimated for one in found)
            spent = endpoint.spent
            assert spent.prompt_tokens == sum(one.prompt_tokens for one in found)
            assert spent.completion_tokens == sum(one.completion_tokens for one in found)
            assert endpoint.complete([ask("endless", max_tokens=10)])[0].is_truncated
        with (
            Endpoint(cfg, "sk-wrong") as endpoint,
            pytest.raises(RequestError, match=r"\(status 401\); set OPENAI_API_"),
        ):
            endpoint.complete([ask("the sum")])


def test_a_stop_ends_the_requests_on_our_server(tmp_path):
    requests = [ask("endless", index=index, max_tokens=6000) for index in range(9)]
    with live(tmp_path, scripted) as server:
        service = server.server.models.members["default"].service
        stop = StopWhen(lambda: service.status.running == 4)
        cfg = EndpointConfig(url=server.url, concurrency=4)
        with Endpoint(cfg, server.key) as endpoint, pytest.raises(Interrupted):
            endpoint.complete(requests, stop=stop)
        until(lambda: service.status.running == 0)


@pytest.mark.slow
def test_thinkstack_serve_with_a_model_answers_all_and_a_killed_server_ends_the_run(tmp_path):
    folder, found = save_tiny(tmp_path / "model"), []
    with serve(str(folder), "--data", str(tmp_path / "data")) as process:
        cfg = EndpointConfig(url=process.url, cache=str(tmp_path / "cache"), retries=2, concurrency=4)
        with Endpoint(cfg, process.key) as endpoint:
            texts = [one.content for one in endpoint.complete([ask(f"question {n}", seed=n) for n in range(20)])]
            again = [ask(f"question {n}", seed=n, index=1) for n in range(20)]
            assert [one.content for one in endpoint.complete(again)] == texts  # equal seeds

            def on_finish(place, completion):
                found.append(place)
                if len(found) == 10:
                    process.process.kill()

            more = [ask(f"question {n}", seed=n, max_tokens=200) for n in range(100)]
            with pytest.raises(RequestError, match=r"cannot reach .* no request was answered during 3 attempts"):
                endpoint.complete(more, on_finish)
    cfg = replace(cfg, model=endpoint.model)
    with Endpoint(cfg, process.key) as endpoint, pytest.raises(RequestError, match=rf"{len(found)} of 100 requests"):
        endpoint.complete(more)
