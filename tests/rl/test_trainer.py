"""The GRPO stage as a whole, on a bandit."""

import logging
import math
from dataclasses import replace

import pytest
import torch

from tests.rl.bandit import arm_config, arm_reward, verify_arm
from thinkstack.rl.config import PRESETS, RLConfig
from thinkstack.rl.health import early_warnings, health_line
from thinkstack.rl.rollout_log import read_rollouts, show_group
from thinkstack.rl.trainer import RLTrainer
from thinkstack.train.optim import OptimConfig
from thinkstack.train.policy_loss import PolicyLossConfig
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.types import ConfigError, Score, TrainingError


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_bandit_is_learned(make_bandit, seed: int):
    """Sign errors, masks off by one and lost advantages all show here: the reward must pass 95 %."""
    rl = make_bandit(seed)
    rewards = []
    while rl.trainer.step_count < rl.cfg.steps:
        before = rl.trainer.step_count
        rewards.append(rl.step()["reward/mean"])
        if rl.trainer.step_count == before:
            break  # no group differs any more
    assert rewards[0] < 0.2
    assert rewards[-1] > 0.95, f"seed {seed} ended at {rewards[-1]:.2f} after {len(rewards)} steps"


def test_on_policy_the_engine_and_the_trainer_agree(make_bandit):
    """The first step's log-probabilities must be those the completions were sampled with."""
    metrics = make_bandit(loss=PolicyLossConfig(reduction="sequence")).step()
    assert metrics["mismatch/abs_nats_max"] < 1e-5
    assert metrics["policy/clipped_low"] == metrics["policy/clipped_high"] == 0
    assert abs(metrics["loss/policy"]) < 1e-6 and metrics["train/grad_norm"] > 1e-3


def test_completions_of_quantized_weights_are_near_the_policys_and_trained_on(make_bandit):
    """Not the same: rounding shows in the log-probabilities, which the loss corrects for."""
    rl = make_bandit(rollout_quantization="int8")
    for _ in range(2):  # packed anew after the first step
        assert 1e-6 < rl.step()["mismatch/abs_nats_max"] < 0.05
    assert rl.engine.version == 2


def test_minibatches_after_the_first_are_off_policy(make_bandit):
    """Without stored old log-probabilities every ratio is 1 and the clip can never bite."""
    fast = TrainerConfig(optim=OptimConfig(learning_rate=5e-2), dtype="fp32", bias_speed=0.0, mtp_weight=0.0)
    rl = make_bandit(minibatches=4, trainer=fast)
    metrics = rl.step()
    assert rl.trainer.step_count == 4
    assert metrics["policy/clipped_low"] + metrics["policy/clipped_high"] > 0
    assert rl.engine.version == 4


def test_a_nucleus_in_training_rollouts_is_refused():
    """Tokens outside the nucleus have probability 0 where they were sampled, and ratios mean nothing."""
    with pytest.raises(ConfigError, match=r"top_p=0\.9"):
        RLConfig(start="", top_p=0.9)


@pytest.mark.parametrize("changes", [{}, {"loss": PolicyLossConfig(kl=0.05), "reference_steps": 3}])
def test_four_steps_equal_two_and_a_resumed_two_bit_for_bit(make_bandit, changes):
    """One counter that was not saved repeats problems or samples after a resume."""
    straight = make_bandit(name="straight", **changes)
    for _ in range(4):
        last = straight.step()
    first = make_bandit(name="halves", **changes)
    for _ in range(2):
        first.step()
    first.save()
    second = make_bandit(seed=0, name="halves", **changes)
    torch.nn.init.zeros_(second.trainer.model.embed.weight)
    from thinkstack.checkpoint.state import load_state

    second.restore(*load_state(second.run.folder / "state"))
    for _ in range(2):
        again = second.step()
    for name, value in straight.trainer.model.state_dict().items():
        assert torch.equal(value, second.trainer.model.state_dict()[name]), name
    expected = {k: v for k, v in last.items() if not k.startswith("time/") and "per_second" not in k}
    assert expected == {k: again[k] for k in expected}


def test_without_a_kl_term_there_is_no_reference(make_bandit):
    """A reference that nothing reads costs the memory of a second model."""
    assert make_bandit().reference is None
    assert make_bandit(name="kl", loss=PolicyLossConfig(kl=0.1)).reference is not None


def test_the_reference_is_replaced_after_reference_steps(make_bandit):
    rl = make_bandit(loss=PolicyLossConfig(kl=0.01), reference_steps=2)
    first = rl.reference.embed.weight.clone()
    rl.step()
    rl.step()
    assert torch.equal(rl.reference.embed.weight, first)
    policy = rl.trainer.model.embed.weight.clone()
    rl.step()
    assert torch.equal(rl.reference.embed.weight, policy) and not torch.equal(policy, first)


def test_with_reference_steps_0_the_reference_stays(make_bandit):
    """0 was documented as a count and divided by."""
    rl = make_bandit(loss=PolicyLossConfig(kl=0.01), reference_steps=0)
    first = rl.reference.embed.weight.clone()
    for _ in range(3):
        rl.step()
    assert torch.equal(rl.reference.embed.weight, first)


def test_the_reference_can_be_another_model(make_bandit):
    """R1's second stage of RL is held to another checkpoint than the one that it starts from."""
    rl = make_bandit(loss=PolicyLossConfig(kl=0.01))
    other = make_bandit(seed=3, name="other").trainer.model
    held = RLTrainer(rl.cfg, rl.run, rl.trainer.model, rl.chat, reference=other)
    held.stream, held.reward = rl.stream, rl.reward
    assert held.step()["policy/kl_nats"] > 0.01
    assert make_bandit(name="own", loss=PolicyLossConfig(kl=0.01)).step()["policy/kl_nats"] < 1e-6


def test_a_reference_without_a_kl_term_is_refused():
    with pytest.raises(ConfigError, match=r"reference='base' has no effect with loss\.kl=0"):
        RLConfig(start="", reference="base")


def test_the_kl_term_holds_the_policy_back(make_bandit):
    free, held = make_bandit(), make_bandit(name="held", loss=PolicyLossConfig(kl=5.0))
    for _ in range(20):
        free_metrics, held_metrics = free.step(), held.step()
    assert held_metrics["policy/kl_nats"] < 0.2 and held_metrics["reward/mean"] < free_metrics["reward/mean"]


def test_a_broken_verifier_fails_the_run(make_bandit):
    """Time-outs of a dead verifier once trained the model to be wrong on purpose."""
    rl = make_bandit()
    rl.reward = arm_reward(lambda problem, response: Score(total=0.0, unscorable="verifier died"))
    with pytest.raises(TrainingError, match="verifier died"):
        rl.step()


def test_a_few_unscorable_completions_are_counted_and_survived(make_bandit):
    rl = make_bandit()
    calls = iter(range(10**6))
    slow = Score(total=0.0, unscorable="slow")
    rl.reward = arm_reward(lambda p, r: slow if next(calls) % 16 == 0 else verify_arm(p, r))
    assert rl.step()["rollout/unscorable"] == pytest.approx(1 / 16)


def test_completions_of_other_weights_are_not_trained_on(make_bandit):
    """Rollouts that outlive a weight update look on-policy and are not."""
    rl = make_bandit()
    rl.engine.load_weights(rl.trainer.model, version=7)
    with pytest.raises(AssertionError, match="completions of weights"):
        rl.step()


def test_evaluations_during_training_use_the_reward_of_the_run(make_bandit, monkeypatch):
    """Regression: a run with another thinking format was evaluated with the default one, so its curve read about 0."""
    rl, rewards = make_bandit(), []

    def evaluate(generate, chat, problems, cfg, reward, pool):
        rewards.append(reward)
        raise KeyboardInterrupt

    monkeypatch.setattr("thinkstack.rl.trainer.evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        rl.evaluate()
    assert rewards == [rl.reward]


def test_training_and_evaluation_score_by_one_function():
    """Two extractors that drift apart make the reward rise and the benchmark stand still."""
    from thinkstack.evals import runner
    from thinkstack.rl import rollout
    from thinkstack.tasks.reward import score

    assert rollout.score is runner.score is score


def test_the_health_line_has_the_most_important_metrics(make_bandit):
    metrics = make_bandit().step()
    line = health_line(metrics)
    for word in ("reward", "format", "mixed", "tokens", "truncated", "entropy", "grad", "mismatch"):
        assert word in line
    for name in (
        *("reward/accuracy", "reward/std", "group/all_high", "group/all_zero", "rollout/max_tokens"),
        *("rollout/truncated", "rollout/tokens_per_second", "policy/clipped_low", "policy/clipped_high"),
        *("mismatch/k3_nats", "train/learning_rate", "time/rollout_seconds", "time/train_seconds"),
    ):
        assert math.isfinite(metrics[name]), name


@pytest.mark.parametrize(
    ("history", "name"),
    [
        ([{"policy/entropy_nats": 0.001}], "entropy"),
        ([{"rollout/truncated": 0.6}], "truncation"),
        ([{"rollout/mean_tokens": 20.0}] * 10 + [{"rollout/mean_tokens": 90.0}] * 6, "length"),
        ([{"group/mixed": 0.0}] * 5, "flat rewards"),
    ],
)
def test_each_kind_of_failure_is_warned_about(history, name):
    assert list(early_warnings(history)) == [name]


def test_a_healthy_run_is_not_warned_about():
    row = {"policy/entropy_nats": 0.5, "rollout/truncated": 0.1, "rollout/mean_tokens": 30.0, "group/mixed": 0.6}
    assert early_warnings([row] * 30) == {} == early_warnings([])


R1_PAPER = {"accuracy": 1.0, "format": 1.0}


def test_the_paper_preset_is_the_papers():
    from thinkstack.config import build, merge

    cfg = build(RLConfig, merge(PRESETS["paper"], {"start": "x", "preset": "paper"}))
    assert (cfg.group_size, cfg.loss.kl, cfg.loss.kl_estimator, cfg.reference_steps) == (16, 0.001, "k3", 400)
    assert (cfg.advantage, cfg.loss.reduction, cfg.reward.parts) == ("standardized", "sequence", R1_PAPER)
    assert cfg.trainer.bias_speed == 0 and cfg.trainer.mtp_detached


def test_rollouts_can_be_browsed_and_a_missing_step_is_named(make_bandit):
    rl = make_bandit(rollout_steps=1)
    rl.step()
    groups = read_rollouts(rl.run.folder, 1)
    text = show_group(groups[0], width=80)
    assert "reference answer: " in text and "advantage" in text and "accuracy" in text
    assert len(groups[0]["completions"]) == rl.cfg.group_size
    assert all(len(a["token_ids"]) == len(a["logprobs"]) for g in groups for a in g["completions"])
    with pytest.raises(ConfigError, match="no rollouts of step 9; logged steps: 1 to 1"):
        read_rollouts(rl.run.folder, 9)


def test_a_group_of_one_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        arm_config(group_size=1)
    assert "group_size=1" in caplog.text


def test_a_run_is_evaluated_in_its_own_format(make_bandit, monkeypatch):
    """A run with another format was judged with the default one, and its curve would have read about 0."""
    from thinkstack.rl import trainer as train_rl
    from thinkstack.tasks.reward import RewardConfig

    used = []
    monkeypatch.setattr(train_rl, "evaluate", lambda *given: used.append(given))
    monkeypatch.setattr(train_rl, "curve_point", lambda *_: {})
    monkeypatch.setattr(train_rl, "_held_out_level", lambda *_: None)
    rl = make_bandit(reward=RewardConfig(thinking_format="think_then_answer"))
    rl.reward = replace(rl.reward, cfg=rl.cfg.reward)
    rl.evaluate()
    ((*_, reward, pool),) = used
    assert reward is rl.reward and pool is rl.pool and reward.cfg.thinking_format == "think_then_answer"
