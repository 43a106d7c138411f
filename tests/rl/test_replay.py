"""A logged step replayed: equal under the weights that sampled it, and not under others."""

import copy
import math

import pytest
import torch

from tests.tiny import GQA_TINY, tiny_model
from thinkstack import cli
from thinkstack.rl.replay import completion_logprobs, describe_replay, replay
from thinkstack.types import ConfigError


def test_the_weights_that_sampled_a_step_give_its_logprobs_and_later_ones_do_not(make_bandit):
    rl = make_bandit(rollout_steps=1)
    initial = copy.deepcopy(rl.trainer.model)
    rl.step()
    found = replay(rl.run.folder, 1, initial)
    assert found.max_abs < 1e-5 and found.weights_versions == (0,)
    assert found.num_completions >= rl.cfg.prompts_per_step * rl.cfg.group_size  # groups sampled again are kept too
    assert found.num_completions <= found.num_tokens <= found.num_completions * rl.cfg.max_tokens
    assert "too large for rounding" not in describe_replay(found)
    later = replay(rl.run.folder, 1, rl.trainer.model)
    assert later.max_abs > 1e-3 and "too large for rounding" in describe_replay(later)
    assert abs(later.logged - later.recomputed) == pytest.approx(later.max_abs)


def test_replay_needs_the_sampling_temperature(make_bandit):
    rl = make_bandit(rollout_steps=1)
    initial = copy.deepcopy(rl.trainer.model)
    rl.step()
    assert replay(rl.run.folder, 1, initial, temperature=2.0).max_abs > 1e-3
    with pytest.raises(ConfigError, match="temperature=0"):
        replay(rl.run.folder, 1, initial, temperature=0)


@torch.no_grad()
def test_a_completions_logprobs_by_hand():
    model = tiny_model(GQA_TINY)
    logits = model(torch.tensor([[3, 5, 7]]))[0]
    expected = [
        float(logits[place, token] / 2) - math.log(sum(math.exp(float(logit) / 2) for logit in logits[place]))
        for place, token in ((1, 7), (2, 4))
    ]
    assert completion_logprobs(model, [3, 5], [7, 4], temperature=2.0).tolist() == pytest.approx(expected, abs=1e-5)
    assert completion_logprobs(model, [3, 5], [], temperature=2.0).tolist() == []


def test_another_models_checkpoint_is_refused(make_bandit):
    rl = make_bandit(rollout_steps=1)
    rl.step()
    with pytest.raises(ConfigError, match="use a checkpoint of that run"):
        replay(rl.run.folder, 1, tiny_model(GQA_TINY, vocab_size=5))


def test_the_command_prints_the_largest_difference(make_bandit, monkeypatch, capsys):
    rl = make_bandit(rollout_steps=1)
    start = {"base/model": copy.deepcopy(rl.trainer.model)}
    rl.step()
    monkeypatch.setattr("thinkstack.checkpoint.model.load_model", start.__getitem__)
    monkeypatch.setattr("sys.argv", ["thinkstack", "replay", str(rl.run.folder), "base/model", "--step", "1"])
    cli.main()
    shown = capsys.readouterr().out
    assert "sampled with the weights of step 0" in shown and "nats on average" in shown and "largest at group" in shown
