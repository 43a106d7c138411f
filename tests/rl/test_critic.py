"""PPO as a stage: the critic beside the policy, on the bandit."""

from dataclasses import replace

import pytest
import torch

from tests.rl.bandit import arm_reward, verify_arm
from tests.rl.test_batches import rollout
from thinkstack.checkpoint.state import load_state
from thinkstack.rl import trainer as train_rl
from thinkstack.rl.advantages import with_advantages
from thinkstack.rl.batches import gather_tokens, minibatches
from thinkstack.rl.critic import Critic, CriticConfig
from thinkstack.rl.health import early_warnings
from thinkstack.train.optim import OptimConfig
from thinkstack.train.policy_loss import PolicyLossConfig
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import Score

PPO = {"advantage": "gae", "dynamic_sampling": False}


@pytest.mark.parametrize("seed", [0, 1])
def test_ppo_learns_the_bandit_and_its_critic_the_returns(make_bandit, seed):
    """At 5e-3, where groups learn, PPO ends at 7 of 8 arms for half of the seeds: docs/algorithms/ppo.md."""
    optim = OptimConfig(learning_rate=2e-3, weight_decay=0.0)
    trainer = TrainerConfig(optim=optim, dtype="fp32", bias_speed=0.0, mtp_weight=0.0)
    rl = make_bandit(seed, critic=CriticConfig(learning_rate=5e-3), trainer=trainer, **PPO)
    rows = [rl.step() for _ in range(110)]
    assert rows[0]["reward/mean"] < 0.2
    assert sum(row["reward/mean"] for row in rows[-5:]) / 5 > 0.95, f"seed {seed}"
    assert max(row["critic/explained_variance"] for row in rows) > 0.2


def test_without_gae_there_is_no_critic(make_bandit):
    """What GRPO saves: a second model and its optimizer."""
    rl = make_bandit()
    assert rl.critic is None and not any(name.startswith("critic/") for name in rl.step())


def test_the_first_advantages_are_the_whitened_returns(make_bandit):
    """A new critic predicts 0, so the advantage is the return, less the mean over tokens, over the deviation.

    Rewards 1 (2 tokens), 0 (2 tokens): mean 1/2, deviation 1/2.
    """
    rl = make_bandit(**PPO)
    group = [rollout(0, 1.0), rollout(0, 0.0)]
    (batch,) = with_advantages([rl.with_logprobs(b) for b in minibatches(group, rl.cfg)], group, rl.cfg)
    assert gather_tokens(batch.advantages, batch) == [[1.0, 1.0], [-1.0, -1.0]]
    assert gather_tokens(batch.returns, batch) == [[1.0, 1.0], [0.0, 0.0]]
    assert gather_tokens(batch.values, batch) == [[0.0, 0.0], [0.0, 0.0]]


def test_every_setting_of_the_critic_changes_the_run(make_bandit):
    """A setting without effect is a bug: each must change the policy or the critic within a few steps."""
    fast = TrainerConfig(optim=OptimConfig(learning_rate=2e-2), dtype="fp32", bias_speed=0.0, mtp_weight=0.0)
    base = CriticConfig(learning_rate=2e-2, clip=0.05)
    changes = {"learning_rate": 1e-3, "gamma": 0.5, "gae_lambda": 0.3, "clip": 0.0, "whiten": False, "prefit_steps": 2}
    ends = {}
    for name in ("", *changes):
        cfg = replace(base, **({name: changes[name]} if name else {}))
        rl = make_bandit(name=name or "base", critic=cfg, minibatches=2, trainer=fast, **PPO)
        for _ in range(3):
            rl.step()
        model = rl.critic.trainer.model
        ends[name] = torch.cat([model.value_weight.detach(), rl.trainer.model.head.weight.detach().flatten()])
    assert [name for name in changes if torch.equal(ends[name], ends[""])] == []
    assert sorted(changes) == sorted(vars(base))


def test_prefitting_the_critic_changes_only_the_critic(make_bandit):
    """A critic that starts at 0 makes the first advantages plain rewards; fitted first, it knows what is usual."""
    rl = make_bandit(critic=CriticConfig(prefit_steps=20, learning_rate=5e-3), **PPO)
    before = rl.trainer.model.head.weight.detach().clone()
    rl.prefit_critic()
    assert rl.critic.trainer.step_count == 20 and rl.trainer.step_count == 0
    assert torch.equal(rl.trainer.model.head.weight, before)
    assert rl.step()["critic/value_mean"] == pytest.approx(1 / 8, abs=0.1)
    rl.step()
    assert rl.critic.trainer.step_count == 22, "once is enough"


def test_the_critic_is_prefitted_with_lambda_1_for_any_gae_lambda(make_bandit, monkeypatch):
    """With lambda 0 a new critic, which predicts 0, would learn 0 for every token but the last. Reward 1, two tokens:
    returns 0 and 1 with lambda 0, 1 and 1 with lambda 1."""
    rl = make_bandit(critic=CriticConfig(gae_lambda=0.0, prefit_steps=1), **PPO)
    group = [rollout(0, 1.0)]
    batches = [rl.with_logprobs(batch) for batch in minibatches(group, rl.cfg)]
    for gae_lambda, returns in ((None, [0.0, 1.0]), (1.0, [1.0, 1.0])):
        (batch,) = with_advantages(batches, group, rl.cfg, gae_lambda)
        assert gather_tokens(batch.returns, batch) == [returns]
    used = []
    monkeypatch.setattr(
        train_rl,
        "with_advantages",
        lambda *given, gae_lambda=None: (used.append(gae_lambda), with_advantages(*given, gae_lambda=gae_lambda))[1],
    )
    rl.step()
    assert used == [1.0, None]


def test_ppo_resumed_is_ppo_uninterrupted(make_bandit):
    """The critic's weights, moments and steps belong to the state too."""
    given = {"critic": CriticConfig(prefit_steps=1), "loss": PolicyLossConfig(kl=0.05), "reference_steps": 3, **PPO}
    straight = make_bandit(name="straight", **given)
    for _ in range(4):
        last = straight.step()
    first = make_bandit(name="halves", **given)
    first.step()
    first.step()
    first.save()
    second = make_bandit(name="halves", **given)
    second.restore(*load_state(second.run.folder / "state"))
    second.step()
    again = second.step()
    for mine, theirs in ((straight, second), (straight.critic, second.critic)):
        for name, value in mine.trainer.model.state_dict().items():
            assert torch.equal(value, theirs.trainer.model.state_dict()[name]), name
    assert {k: v for k, v in last.items() if k.startswith("critic/")} == {
        k: v for k, v in again.items() if k.startswith("critic/")
    }


def test_the_critic_does_not_train_on_an_unscorable_completion(make_bandit):
    rl = make_bandit(**PPO)
    calls = iter(range(10**6))
    slow = Score(total=0.0, unscorable="slow")
    rl.reward = arm_reward(lambda p, r: slow if next(calls) % 16 == 0 else verify_arm(p, r))
    assert rl.step()["rollout/unscorable"] == pytest.approx(1 / 16)


def test_the_critics_learning_rate_is_its_own(make_bandit):
    rl = make_bandit(critic=CriticConfig(learning_rate=0.5), **PPO)
    assert isinstance(rl.critic, Critic)
    assert rl.critic.trainer.cfg.optim.learning_rate == 0.5 != rl.trainer.cfg.optim.learning_rate


def test_a_critic_worse_than_the_mean_is_warned_about():
    rows = [{"critic/explained_variance": -0.2}] * 5
    assert list(early_warnings(rows)) == ["critic"]
    assert early_warnings([*rows[:4], {"critic/explained_variance": 0.3}]) == {}


def test_completions_lost_to_the_engine_correction_are_warned_about():
    assert list(early_warnings([{"correction/masked": 0.6}])) == ["mismatch"]
