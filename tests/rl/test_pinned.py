"""The default preset computes what it computed when the demo was measured, to the last bit.

The loss of that day is written out below. A run with it and a run with the package's must end with equal weights, so
the pin holds on any machine.
"""

import pytest
import torch

from thinkstack.rl import trainer as train_rl
from thinkstack.rl.config import RLConfig
from thinkstack.train.optim import OptimConfig
from thinkstack.train.policy_loss import PolicyLossConfig
from thinkstack.train.trainer_config import TrainerConfig

FAST = TrainerConfig(optim=OptimConfig(learning_rate=5e-2), dtype="fp32", bias_speed=0.0, mtp_weight=0.0)
RUNS = {
    "default": {},
    "several optimizer steps per rollout step": {"minibatches": 4, "trainer": FAST},
    "paper": {
        "advantage": "standardized",
        "dynamic_sampling": False,
        "loss": PolicyLossConfig(reduction="sequence", clip_high=0.2, kl=0.01, importance_cap=0.0),
    },
}


def measured_loss(tokens, cfg):
    """policy_loss as of the measured demo."""
    old = tokens.logprobs.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    ratio = (tokens.logprobs - old).clamp(-20.0, 20.0).exp()
    gain = torch.minimum(
        ratio * tokens.advantages, ratio.clamp(1 - cfg.clip_low, 1 + cfg.clip_high) * tokens.advantages
    )
    mismatch = (old - tokens.rollout_logprobs).clamp(-20.0, 20.0).exp()
    if cfg.importance_cap:
        gain = gain * mismatch.clamp(max=cfg.importance_cap)
    loss = -(tokens.weights * gain).sum()
    if cfg.kl:
        difference = (tokens.reference_logprobs - tokens.logprobs).clamp(-20.0, 20.0)
        kl = difference.square() / 2 if cfg.kl_estimator == "k2" else difference.exp() - difference - 1
        loss = loss + cfg.kl * (tokens.weights * kl).sum()
    return loss, {}


@pytest.mark.parametrize("changes", RUNS.values(), ids=RUNS)
def test_the_default_objective_is_that_of_the_measured_demo(make_bandit, monkeypatch, changes):
    ends = []
    for name in ("now", "then"):
        if name == "then":
            monkeypatch.setattr(train_rl, "policy_loss", measured_loss)
        rl = make_bandit(name=name, **changes)
        for _ in range(3):
            rl.step()
        ends.append(rl.trainer.model.state_dict())
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_the_default_settings_are_those_of_the_measured_demo():
    cfg, loss = RLConfig(start=""), PolicyLossConfig()
    assert (cfg.prompts_per_step, cfg.group_size, cfg.minibatches, cfg.max_tokens) == (24, 16, 1, 128)
    assert (cfg.advantage, cfg.dynamic_sampling, cfg.max_rounds) == ("centered", True, 3)
    assert (loss.clip_low, loss.clip_high, loss.reduction, loss.kl, loss.importance_cap) == (0.2, 0.28, "token", 0, 2)
    assert (loss.temperature, cfg.reward.parts) == (1.0, {"accuracy_if_formatted": 1.0})
