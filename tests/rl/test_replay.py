"""A kept step replayed: equal under the weights that drew it, and not under others."""

import copy
import math

import pytest
import torch

from tests.tiny import GQA_TINY, tiny_model
from thinkstack import cli
from thinkstack.rl.replay import answer_logprobs, describe_replay, replay
from thinkstack.types import ConfigError


def test_the_weights_that_drew_a_step_give_its_logprobs_and_later_ones_do_not(make_bandit):
    zero = make_bandit(rollout_steps=1)
    drew = copy.deepcopy(zero.trainer.model)
    zero.step()
    found = replay(zero.run.folder, 1, drew)
    assert found.max_abs < 1e-5 and found.weights_versions == (0,)
    assert found.num_answers >= zero.cfg.prompts_per_step * zero.cfg.group_size  # groups drawn again are kept too
    assert found.num_answers <= found.num_tokens <= found.num_answers * zero.cfg.max_tokens
    assert "more than rounding" not in describe_replay(found)
    later = replay(zero.run.folder, 1, zero.trainer.model)
    assert later.max_abs > 1e-3 and "more than rounding" in describe_replay(later)
    assert abs(later.stored - later.recomputed) == pytest.approx(later.max_abs)


def test_the_temperature_of_drawing_is_asked_for(make_bandit):
    zero = make_bandit(rollout_steps=1)
    drew = copy.deepcopy(zero.trainer.model)
    zero.step()
    assert replay(zero.run.folder, 1, drew, temperature=2.0).max_abs > 1e-3
    with pytest.raises(ConfigError, match="temperature=0"):
        replay(zero.run.folder, 1, drew, temperature=0)


@torch.no_grad()
def test_an_answers_logprobs_by_hand():
    model = tiny_model(GQA_TINY)
    logits = model(torch.tensor([[3, 5, 7]]))[0]
    expected = [
        float(logits[place, token] / 2) - math.log(sum(math.exp(float(logit) / 2) for logit in logits[place]))
        for place, token in ((1, 7), (2, 4))
    ]
    assert answer_logprobs(model, [3, 5], [7, 4], temperature=2.0).tolist() == pytest.approx(expected, abs=1e-5)
    assert answer_logprobs(model, [3, 5], [], temperature=2.0).tolist() == []


def test_another_models_checkpoint_is_refused(make_bandit):
    zero = make_bandit(rollout_steps=1)
    zero.step()
    with pytest.raises(ConfigError, match="give a checkpoint of that run"):
        replay(zero.run.folder, 1, tiny_model(GQA_TINY, vocab_size=5))


def test_the_command_prints_the_largest_difference(make_bandit, monkeypatch, capsys):
    zero = make_bandit(rollout_steps=1)
    start = {"base/model": copy.deepcopy(zero.trainer.model)}
    zero.step()
    monkeypatch.setattr("thinkstack.checkpoint.model.load_model", start.__getitem__)
    monkeypatch.setattr("sys.argv", ["thinkstack", "replay", str(zero.run.folder), "base/model", "--step", "1"])
    cli.main()
    shown = capsys.readouterr().out
    assert "drawn by the weights of step 0" in shown and "nats in the mean" in shown and "most in group" in shown
