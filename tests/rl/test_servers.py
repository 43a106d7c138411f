"""Recipes that sample on servers instead of in this process, by one setting."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.fake_vllm import FakePool
from tests.rl.bandit import ARMS
from tests.tiny import GQA_TINY, tiny_model, tiny_tokenizer
from thinkstack.checkpoint.model import save_model
from thinkstack.engine import remote
from thinkstack.engine.remote import RemoteEngine, ServersConfig
from thinkstack.engine.vllm import Server
from thinkstack.log import Run
from thinkstack.stages.evaluate import GREEDY, EvaluateConfig, evaluate_checkpoint

SHAPE = replace(GQA_TINY, vocab_size=2 + ARMS, num_layers=1, max_positions=64, init_std=0.1)
"""The bandit's model, as a checkpoint can hold it."""


@pytest.fixture
def pool(monkeypatch) -> FakePool:
    """Two servers that the engines of this test find."""
    found = FakePool("a", "b", context=512)
    monkeypatch.setattr(remote, "Server", lambda address, seconds, key, _: Server(address, seconds, key, found))
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.0)
    return found


def test_reinforcement_learning_learns_from_what_servers_sample(make_bandit, pool):
    """The weights of every step get there, and the log-probabilities that come back are those of the policy."""
    rl = make_bandit(shape=SHAPE, servers=ServersConfig(addresses=pool.addresses))
    assert isinstance(rl.engine, RemoteEngine)
    rewards = []
    for step in range(30):
        metrics = rl.step()
        rewards.append(metrics["reward/mean"])
        assert metrics["mismatch/abs_nats_max"] < 1e-5, step
    assert rl.engine.version == 30
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5]), rewards
    assert all(server.bodies for server in pool.servers.values())


def test_a_server_started_anew_in_the_middle_changes_nothing(make_bandit, pool):
    rl, quiet = (
        make_bandit(shape=SHAPE, servers=ServersConfig(addresses=pool.addresses)),
        make_bandit(name="quiet", shape=SHAPE),
    )
    rl.step()
    pool["b"].restart()
    pool["b"].engine.load_weights(quiet.trainer.model, 0)
    assert rl.step()["mismatch/abs_nats_max"] < 1e-5


def test_an_evaluation_gives_the_same_figures(pool, tmp_path: Path):
    save_model(
        tmp_path / "model",
        tiny_model(GQA_TINY, vocab_size=360, max_positions=512),
        tiny_tokenizer(),
        "r1_zero_short",
    )
    found = []
    for name, addresses in (("here", ()), ("there", pool.addresses)):
        cfg = EvaluateConfig(
            start=str(tmp_path / "model"),
            num_problems=6,
            samples=2,
            max_tokens=24,
            device="cpu",
            servers=ServersConfig(addresses=addresses),
        )
        evaluate_checkpoint(cfg, Run(tmp_path / name))
        figures = json.loads((tmp_path / name / GREEDY).read_text(encoding="utf-8"))
        found.append({key: value for key, value in figures.items() if "second" not in key and key != "sampler"})
    assert found[0] == found[1] and pool["a"].bodies
