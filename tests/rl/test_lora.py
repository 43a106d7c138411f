"""Reinforcement learning of adapters: no second model for the reference, folders that others open."""

from dataclasses import replace

import pytest
import torch

from tests.rl.test_router_replay import BANDIT
from thinkstack.checkpoint.state import load_state
from thinkstack.models.lora import LoRAConfig, adapters, adapters_off, merged_tensors
from thinkstack.rl.config import RLConfig
from thinkstack.rl.critic import CriticConfig
from thinkstack.train.optim import OptimConfig
from thinkstack.train.policy_loss import PolicyLossConfig
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import ConfigError

LORA = LoRAConfig(rank=8, alpha=16.0)
WIDE = replace(BANDIT, moe=None, init_std=0.2)
"""With the head frozen, logits are bounded by its size: at the usual one no answer can become certain."""


def trainer(**changes) -> TrainerConfig:
    rate = OptimConfig(learning_rate=1e-2, weight_decay=0.0)
    return TrainerConfig(
        **({"optim": rate, "dtype": "fp32", "bias_speed": 0.0, "mtp_weight": 0.0, "lora": LORA} | changes)
    )


def test_a_bandit_is_learned_by_adapters_alone(make_bandit):
    rl = make_bandit(shape=WIDE, trainer=trainer())
    start = {name: value.clone() for name, value in rl.trainer.model.state_dict().items() if ".adapter." not in name}
    rewards = []
    while rl.trainer.step_count < 60 and (not rewards or rewards[-1] < 0.9):
        metrics = rl.step()
        rewards.append(metrics["reward/mean"])
        assert metrics["mismatch/abs_nats_max"] < 1e-4
    assert rewards[0] < 0.2 and rewards[-1] > 0.9
    now = rl.trainer.model.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in start.items())


def test_the_reference_is_the_policy_without_its_adapters(make_bandit):
    """A second copy of the weights would cost more than the adapters and their optimizer together."""
    rl = make_bandit(trainer=trainer(), loss=PolicyLossConfig(kl=0.1))
    assert rl.reference is None
    assert rl.step()["policy/kl_nats"] == 0.0, "it begins as the policy"
    for _ in range(3):
        kl = rl.step()["policy/kl_nats"]
    assert kl > 0
    batch = rl.with_logprobs(_batch(rl))
    with adapters_off(rl.trainer.model) as start:
        assert torch.equal(batch.reference_logprobs, rl.logprobs(start, batch))
    assert not torch.equal(batch.reference_logprobs, rl.logprobs(rl.trainer.model, batch))


def _batch(rl):
    from thinkstack.rl.batches import pack_rollouts

    selected = rl.collect_rollouts()[0]
    return pack_rollouts(selected, range(len(selected)), 16)


@pytest.mark.parametrize("placement", ["loss", "reward"])
def test_adapters_resume_bit_for_bit(make_bandit, placement):
    kl = PolicyLossConfig(kl=0.05, kl_placement=placement, kl_estimator="k3" if placement == "loss" else "k1")
    given = {"trainer": trainer(), "loss": kl, "minibatches": 2, "reference_steps": 1000}
    straight, first = make_bandit(name="straight", **given), make_bandit(name="halves", **given)
    for _ in range(3):
        straight.step()
    for _ in range(2):
        first.step()
    first.save()
    second = make_bandit(name="halves", **given)
    second.restore(*load_state(second.run.folder / "state"))
    second.step()
    for name, value in straight.trainer.model.state_dict().items():
        assert torch.equal(value, second.trainer.model.state_dict()[name]), name


def test_adapters_of_experts_and_replayed_routes_go_together(make_bandit):
    lora = LoRAConfig(rank=4, targets=("attention", "feed_forward", "experts"))
    rl = make_bandit(shape=BANDIT, router_replay=True, trainer=trainer(lora=lora))
    for _ in range(3):
        assert rl.step()["mismatch/abs_nats_max"] < 1e-4
    assert all(bool(adapter.lora_b.any()) for adapter in adapters(rl.trainer.model).values())


def test_a_critic_is_a_whole_model_beside_adapters(make_bandit):
    rl = make_bandit(
        trainer=trainer(), advantage="gae", dynamic_sampling=False, critic=CriticConfig(learning_rate=1e-3)
    )
    start = dict(merged_tensors(rl.trainer.model))
    critic = rl.critic.trainer.model
    assert not adapters(critic) and torch.equal(critic.embed.weight, start["embed.weight"])
    rl.step()
    rl.step()  # its head begins at zero: nothing else moves in the first step
    assert not torch.equal(critic.embed.weight, start["embed.weight"])


def test_a_reference_that_cannot_be_replaced_is_refused():
    with pytest.raises(ConfigError, match="reference_steps=40"):
        RLConfig(start="", trainer=trainer(), loss=PolicyLossConfig(kl=0.1), steps=50, reference_steps=40)
