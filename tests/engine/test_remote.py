"""The pool of servers: recorded replies of a real one, and failures of one of several."""

import json
import logging
import threading
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest
import torch

from tests import HANG_SECONDS
from tests.engine.fake_vllm import FakePool
from tests.engine.reference import adjust
from tests.engine.vllm_wire import ASKED, CONTEXT, FILE, PROMPT, REFUSED, SERVED, STREAMED, Replay
from tests.tiny import GQA_TINY, tiny_model
from thinkstack.engine import remote
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.remote import RemoteEngine, ServersConfig, open_engine
from thinkstack.engine.vllm import server_seed
from thinkstack.kernels.sampling import filter_logprobs
from thinkstack.types import Completion, ConfigError, RequestError, SamplingParams

RECORDS = json.loads(FILE.read_text(encoding="utf-8"))
ONE = ServersConfig(addresses=("http://server:1",))
SHORT = SamplingParams(max_tokens=4)
END = 1
"""End token of the checkpoint that the server was started with: before min_tokens vLLM bans it too, whether it ends an
answer or not."""


def replayed(kind: str = "processed") -> RemoteEngine:
    return RemoteEngine(tiny_model(SERVED), EngineConfig(), ONE, transport=Replay(RECORDS[kind]))


def expected_logprobs(model, sampling: SamplingParams, found: Completion) -> list[float]:
    """Expected log-probabilities of a completion of PROMPT, from our sampler and a plain forward pass."""
    ids = [*PROMPT, *found.token_ids]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, len(PROMPT) - 1 : -1]
    values = []
    for place, row in enumerate(logits):
        adjust(row, sampling, PROMPT, found.token_ids[:place])
        row = torch.log_softmax(row / (sampling.temperature or 1.0), -1).unsqueeze(0)
        filters = (torch.tensor([value]) for value in (sampling.top_k, sampling.top_p, sampling.min_p))
        values.append(float(filter_logprobs(row, *filters)[0, found.token_ids[place]]))
    return values


# -- as recorded


@pytest.mark.parametrize("name", ASKED)
def test_a_real_server_samples_from_our_distribution(name: str):
    """All parameters have the same meaning and order: bias, bans, penalties, temperature, min-p, top-k, top-p."""
    sampling, model = ASKED[name], tiny_model(SERVED)
    (group,) = replayed().generate([PROMPT], [sampling])
    if sampling.min_tokens:
        sampling = replace(sampling, stop_token_ids=(*sampling.stop_token_ids, END))
    assert len(group) == sampling.n and len({found.token_ids for found in group}) == sampling.n
    for found in group:
        assert found.logprobs == pytest.approx(expected_logprobs(model, sampling, found), abs=1e-4)
        assert found.finish_reason in ("stop", "length")
        stops = [token in sampling.stop_token_ids for token in found.token_ids]
        assert not any(stops[:-1]) and (found.finish_reason == "stop") == stops[-1]
        assert len(found.token_ids) > sampling.min_tokens


@pytest.mark.parametrize("name", [name for name, sampling in ASKED.items() if not sampling.temperature])
def test_a_real_servers_most_likely_tokens_are_ours(name: str):
    (theirs,) = replayed().generate([PROMPT], [ASKED[name]])
    (ours,) = Engine(tiny_model(SERVED), EngineConfig()).generate([PROMPT], [ASKED[name]])
    assert theirs[0].token_ids == ours[0].token_ids and theirs[0].finish_reason == ours[0].finish_reason
    if ASKED[name].top_logprobs:
        for likely, own in zip(theirs[0].top_logprobs, ours[0].top_logprobs, strict=True):
            assert [token for token, _ in likely] == [token for token, _ in own]
            assert [value for _, value in likely] == pytest.approx([value for _, value in own], abs=1e-4)


def test_a_real_server_streams():
    engine = replayed()
    assert tuple(engine.stream(PROMPT, STREAMED)) == engine.generate([PROMPT], [ASKED["greedy"]])[0][0].token_ids[:6]


def test_a_real_server_loads_other_weights():
    engine = replayed()
    engine.load_weights(tiny_model(SERVED, seed=1), 1)
    engine.load_weights(tiny_model(SERVED, seed=1), 2, running="abort")
    (found,) = engine.generate([PROMPT], [ASKED["greedy"]])[0]
    (ours,) = Engine(tiny_model(SERVED, seed=1), EngineConfig()).generate([PROMPT], [ASKED["greedy"]])[0]
    assert found.token_ids == ours.token_ids and found.weights_version == 2 == engine.version


def test_requests_that_a_real_server_refuses_raise_and_it_stays_available():
    engine = replayed()
    with pytest.raises(RequestError, match=r"temperature must be in \[0, 2\]"):
        engine.generate([PROMPT], [REFUSED])
    assert engine.health().alive and engine.health().failed == 0


def test_a_real_server_with_raw_log_probabilities_is_recognized():
    engine = replayed("raw")
    assert engine.server_states[0].reports_raw_logprobs and not replayed().server_states[0].reports_raw_logprobs
    with pytest.raises(RequestError, match="--logprobs-mode processed_logprobs"):
        engine.generate([PROMPT], [ASKED["cold"]])
    with pytest.raises(RequestError, match="--logprobs-mode raw_logprobs"):
        replayed().generate([PROMPT], [replace(ASKED["cold"], raw_logprobs=True)])


def test_the_context_is_the_shorter_of_model_and_server():
    assert RECORDS["version"] == "0.32.0" and replayed().max_model_len == CONTEXT < SERVED.max_positions
    with pytest.raises(ConfigError, match=r"max_model_len=300 exceeds the context length 256.*--max-model-len 300"):
        RemoteEngine(tiny_model(SERVED), EngineConfig(max_model_len=300), ONE, transport=Replay(RECORDS["processed"]))


# -- a pool


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.01)


def pooled(pool: FakePool, **settings) -> RemoteEngine:
    known = {"addresses": pool.addresses, "patience_seconds": HANG_SECONDS}
    return RemoteEngine(tiny_model(GQA_TINY), EngineConfig(), ServersConfig(**known | settings), transport=pool)


def generate(engine: RemoteEngine, count: int = 12) -> list[tuple[int, ...]]:
    found = engine.generate([[1 + place] for place in range(count)], [SHORT] * count)
    return [group[0].token_ids for group in found]


def expected(count: int = 12) -> list[tuple[int, ...]]:
    """The expected completions: they depend on the seed only, and fake servers use our engine."""
    sampling = replace(SHORT, seed=server_seed(0))
    engine = Engine(tiny_model(GQA_TINY), EngineConfig())
    return [group[0].token_ids for group in engine.generate([[1 + n] for n in range(count)], [sampling] * count)]


def test_completions_come_in_order_from_all_servers_and_progress_is_reported():
    pool = FakePool("a", "b")
    engine, told = pooled(pool), {}
    pool["a"].before_answer = pool["b"].before_answer = threading.Barrier(12, timeout=HANG_SECONDS).wait
    found = engine.generate([[1 + place] for place in range(12)], [SHORT] * 12, told.__setitem__)
    assert [group[0].token_ids for group in found] == expected() and [told[place] for place in range(12)] == found
    assert [len(server.bodies) - 1 for server in pool.servers.values()] == [6, 6], "the first checks the weights"


def test_a_server_gets_no_more_requests_than_it_may():
    pool = FakePool("a", "b")
    engine = pooled(pool, in_flight=2)
    pool["a"].before_answer = pool["b"].before_answer = threading.Barrier(4, timeout=HANG_SECONDS).wait
    assert generate(engine) == expected()
    assert [server.most_at_once for server in pool.servers.values()] == [2, 2]


FAILURES = {
    "gone": httpx2.ConnectError("refused"),
    "hanging": httpx2.ReadTimeout("too long"),
    "broken": 500,
    "busy": 503,
    "talking nonsense": "<html>",
    "missing fields": '{"choices": [{}]}',
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_the_other_servers_replace_one_that_fails(failure, caplog):
    pool = FakePool("a", "b")
    engine = pooled(pool)
    pool["a"].failing = failure
    with caplog.at_level(logging.WARNING):
        assert generate(engine) == expected()
    health = engine.health()
    assert health.alive and 0 < health.failed <= 12 and health.running == 0
    assert "http://a:1" in health.last_error and "http://a:1 is unavailable" in caplog.text


def test_a_server_that_comes_back_gets_the_weights_and_work_again():
    pool = FakePool("a", "b")
    engine = pooled(pool)
    pool["a"].failing = httpx2.ConnectError("refused")
    assert generate(engine) == expected()
    engine.load_weights(tiny_model(GQA_TINY, seed=1), 1)
    pool["a"].restart()
    pool["a"].bodies.clear()
    pool["b"].failing = httpx2.ConnectError("refused")
    found = engine.generate([[1]], [SamplingParams(temperature=0, max_tokens=4)])[0][0]
    (ours,) = Engine(tiny_model(GQA_TINY, seed=1), EngineConfig()).generate(
        [[1]], [SamplingParams(temperature=0, max_tokens=4)]
    )[0]
    assert found.token_ids == ours.token_ids and found.weights_version == 1
    assert pool["a"].bodies and pool["a"].name == engine._name


def test_completions_of_other_weights_are_discarded():
    """A restarted server samples from the weights that it was started with."""
    pool = FakePool("a")
    engine = pooled(pool)
    pool["a"].restart()
    pool["a"].engine.load_weights(tiny_model(GQA_TINY, seed=5), 0)
    assert generate(engine, 1) == expected(1)
    assert "instead of" in engine.health().last_error


def test_weights_that_were_not_loaded_are_detected():
    pool = FakePool("a")
    engine = pooled(pool, patience_seconds=0.0)
    pool["a"].keeps_weights = True
    engine.load_weights(tiny_model(GQA_TINY, seed=1), 1)
    assert not engine.health().alive and "does not sample from the loaded weights" in engine.health().last_error
    with pytest.raises(RequestError, match="no server is available"):
        generate(engine)


def test_no_available_server_raises_with_the_reason_of_each():
    pool = FakePool("a", "b")
    pool["a"].failing, pool["b"].failing = httpx2.ConnectError("refused"), 500
    with pytest.raises(ConfigError, match=r"http://a:1: ConnectError.*http://b:1: /health returned status 500"):
        pooled(pool)


def test_a_request_that_every_server_fails_at_raises():
    """A request that crashes servers must not be retried forever."""
    pool = FakePool("a", "b", "c")
    engine = pooled(pool, retries=1)
    for server in pool.servers.values():
        server.complete = lambda body: httpx2.Response(500, json={"error": {"message": "EngineCore died"}})
    with pytest.raises(RequestError, match=r"in 2 attempts: .*EngineCore died"):
        engine.generate([[1]], [SHORT])


def test_a_server_without_the_endpoints_is_distinguished_from_a_broken_one():
    pool = FakePool("a")
    pool["a"].failing = 403
    with pytest.raises(ConfigError, match="VLLM_API_KEY"):
        pooled(pool)
    pool["a"].failing = 404
    with pytest.raises(ConfigError, match="VLLM_SERVER_DEV_MODE=1"):
        pooled(pool)


def test_the_key_of_the_environment_is_sent(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    seen = []
    pool = FakePool("a")
    handle = pool.handle_request
    pool.handle_request = lambda request: seen.append(request.headers.get("Authorization")) or handle(request)
    pooled(pool)
    assert set(seen) == {"Bearer secret"}


def test_logits_that_are_not_finite_fail_the_request():
    pool = FakePool("a")
    engine = pooled(pool)
    choice = pool["a"].choice
    pool["a"].choice = lambda place, found: choice(place, replace(found, logprobs=(-9999.0,) * len(found.logprobs)))
    with pytest.raises(RequestError, match="not finite"):
        engine.generate([[1]], [SHORT])


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"thinking_budget": 2, "think_end_token_ids": (3,)}, "thinking_budget=2"),
        ({"prompt_logprobs": 1}, "prompt_logprobs are not read from vLLM servers"),
        ({"temperature": 0.001}, r"temperature=0\.001"),
        ({"max_tokens": 96}, "shorten"),
        ({"stop_token_ids": (48,)}, "stop_token_ids contains token id 48"),
    ],
)
def test_unsupported_requests_are_refused_before_they_are_sent(changes, part):
    pool = FakePool("a")
    engine = pooled(pool)
    before = len(pool["a"].bodies)
    with pytest.raises(RequestError, match=part):
        engine.generate([[1], [1, 2]], [SHORT, replace(SHORT, **changes)])
    assert len(pool["a"].bodies) == before


def test_invalid_settings_are_refused():
    pool = FakePool("a")
    with pytest.raises(ConfigError, match="router_replay"):
        RemoteEngine(tiny_model(GQA_TINY), EngineConfig(return_routed_experts=True), ONE, transport=pool)
    with pytest.raises(ConfigError, match="--quantization"):
        RemoteEngine(tiny_model(GQA_TINY), EngineConfig(quantization="int8"), ONE, transport=pool)
    with pytest.raises(ConfigError, match="http://host:port"):
        RemoteEngine(tiny_model(GQA_TINY), EngineConfig(), ServersConfig(addresses=("a:1",)), transport=pool)
    with pytest.raises(ConfigError, match="twice"):
        ServersConfig(addresses=("http://a:1", "http://a:1"))
    with pytest.raises(RequestError, match="keep"):
        pooled(pool).load_weights(tiny_model(GQA_TINY), 1, running="keep")


def test_weights_do_not_change_under_an_open_stream():
    engine = pooled(FakePool("a"))
    answer = engine.stream([1], SHORT)
    next(answer)
    with pytest.raises(RequestError, match="requests are running"):
        engine.load_weights(tiny_model(GQA_TINY, seed=1), 1)
    answer.close()
    engine.load_weights(tiny_model(GQA_TINY, seed=1), 1)


def test_an_interrupt_aborts_running_requests():
    """Ctrl-C must abort the requests on the servers, and not wait for queued ones."""
    pool = FakePool("a")
    engine, aborted = pooled(pool, in_flight=2), threading.Event()
    handle, first = pool.handle_request, iter([True])

    def handle_request(request):
        if request.url.path == "/abort_requests":
            aborted.set()
        return handle(request)

    def wait_for_the_abort() -> None:
        assert next(first, False) or aborted.wait(HANG_SECONDS)

    pool.handle_request, pool["a"].before_answer = handle_request, wait_for_the_abort

    def stop(place: int, completions: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1]] * 64, [SHORT] * 64, stop)
    assert "/abort_requests" in pool["a"].paths and len(pool["a"].bodies) < 6
    assert engine.health().running == 0
    assert threading.active_count() < 8


def test_only_one_set_of_weights_is_in_the_folder(tmp_path: Path):
    engine = pooled(FakePool("a"), weights_folder=str(tmp_path))
    for version in (1, 2):
        engine.load_weights(tiny_model(GQA_TINY, seed=version), version)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    engine.close()
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_written_leave_the_old_ones_in_use(monkeypatch):
    engine = pooled(FakePool("a"))

    def refuse(*given) -> None:
        raise ConfigError("the disk is full")

    monkeypatch.setattr(remote, "save_model", refuse)
    with pytest.raises(ConfigError, match="full"):
        engine.load_weights(tiny_model(GQA_TINY, seed=1), 1)
    assert generate(engine) == expected() and engine.version == 0


def test_one_setting_switches_to_servers():
    assert isinstance(open_engine(tiny_model(), EngineConfig(), ServersConfig()), Engine)
