"""One line of health for each step of reinforcement learning, and early warnings in words."""

import statistics
from collections.abc import Sequence

from thinkstack.rl.groups import by_group, is_mixed, reward_of
from thinkstack.rl.rollout import RolloutStep

ENTROPY_FLOOR_NATS = 0.02
LENGTH_GROWTH = 2.5
TRUNCATED_SHARE = 0.5
MASKED_SHARE = 0.5
FLAT_STEPS = 5
"""Steps in a row without contrast before a warning."""
WINDOW = 5
"""Steps over which lengths are averaged."""


def describe(rollout_step: RolloutStep) -> dict[str, float]:
    """Statistics of one step's answers under flat names (docs/metrics.md)."""
    rollouts = rollout_step.rollouts
    if not rollouts:
        return {"rollout/answers": 0.0, "rollout/too_long_prompts": float(rollout_step.too_long)}
    scored = [rollout for rollout in rollouts if reward_of(rollout) is not None]
    rewards = [rollout.score.total for rollout in scored if rollout.score]
    lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
    groups = by_group(rollouts)
    flat = [[r for r in map(reward_of, group) if r is not None] for group in groups if not is_mixed(group)]
    metrics = {
        "reward/mean": statistics.fmean(rewards or [0.0]),
        "reward/std": statistics.pstdev(rewards or [0.0]),
        "group/mixed": sum(map(is_mixed, groups)) / len(groups),
        "group/all_high": sum(bool(rewards) and rewards[0] > 0 for rewards in flat) / len(groups),
        "group/all_zero": sum(bool(rewards) and rewards[0] <= 0 for rewards in flat) / len(groups),
        "group/trained": float(len(by_group(rollout_step.trainable))),
        "rollout/answers": float(len(rollouts)),
        "rollout/rounds": float(rollout_step.rounds),
        "rollout/mean_tokens": statistics.fmean(lengths),
        "rollout/max_tokens": float(max(lengths)),
        "rollout/truncated": sum(r.completion.finish_reason == "length" for r in rollouts) / len(rollouts),
        "rollout/unscorable": 1 - len(scored) / len(rollouts),
        "rollout/too_long_prompts": float(rollout_step.too_long),
    }
    names = sorted({name for rollout in scored if rollout.score for name in rollout.score.parts})
    for name in names:
        metrics[f"reward/{name}"] = statistics.fmean(r.score.parts.get(name, 0.0) for r in scored if r.score)
    return metrics


def health_line(metrics: dict[str, float]) -> str:
    """The numbers to look at first."""
    wanted = (
        ("reward", "reward/mean", ".3f"),
        ("format", "reward/format", ".2f"),
        ("mixed", "group/mixed", ".2f"),
        ("tokens", "rollout/mean_tokens", ".0f"),
        ("cut", "rollout/truncated", ".2f"),
        ("entropy", "policy/entropy_nats", ".3f"),
        ("grad", "train/grad_norm", ".2f"),
        ("mismatch", "mismatch/mean_abs_nats", ".4f"),
        ("critic", "critic/explained_variance", ".2f"),
    )
    return "  ".join(f"{name} {metrics[key]:{form}}" for name, key, form in wanted if key in metrics)


def early_warnings(history: Sequence[dict[str, float]]) -> dict[str, str]:
    """What the last rows of metrics say is going wrong, by name; empty when all is well."""
    if not history:
        return {}
    last, found = history[-1], {}
    if last.get("policy/entropy_nats", 1.0) < ENTROPY_FLOOR_NATS:
        found["entropy"] = (
            f"{last['policy/entropy_nats']:.4f} nats is below {ENTROPY_FLOOR_NATS}: answers hardly differ any more, so "
            "groups stop teaching; lower the learning rate or raise clip_high"
        )
    if last.get("rollout/truncated", 0.0) > TRUNCATED_SHARE:
        found["truncation"] = (
            f"{last['rollout/truncated']:.0%} of the answers are cut off at max_tokens before their final answer; "
            "raise max_tokens of the stage, or look at the rollouts for endless repetition"
        )
    if last.get("correction/masked", 0.0) > MASKED_SHARE:
        found["mismatch"] = (
            f"{last['correction/masked']:.0%} of the tokens are masked: engine and trainer disagree about most of what "
            "was drawn; look at mismatch/, use fp32, or raise loss.importance_cap"
        )
    explained = [row.get("critic/explained_variance", 0.0) for row in history[-WINDOW:]]
    if len(explained) == WINDOW and max(explained) < 0:
        found["critic"] = (
            f"for {WINDOW} steps the critic was worse than the mean return; raise critic.prefit_steps or lower "
            "critic.learning_rate"
        )
    lengths = [row["rollout/mean_tokens"] for row in history if "rollout/mean_tokens" in row]
    if len(lengths) >= 3 * WINDOW:
        first, now = statistics.fmean(lengths[:WINDOW]), statistics.fmean(lengths[-WINDOW:])
        if now > LENGTH_GROWTH * first:
            found["length"] = (
                f"answers grew from {first:.0f} to {now:.0f} tokens; check in the rollouts that this is thought"
            )
    tail = [row.get("group/mixed", 1.0) for row in history[-FLAT_STEPS:]]
    if len(tail) == FLAT_STEPS and max(tail) == 0:
        found["flat rewards"] = (
            f"for {FLAT_STEPS} steps no group had answers of different reward; the problems are all too hard or too "
            "easy, or the reward is wrong; look at the rollouts"
        )
    return found
