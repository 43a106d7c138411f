"""Metrics, console line and early warnings of a step of reinforcement learning."""

import statistics
from collections.abc import Sequence

from thinkstack.rl.rollout import RolloutStep, by_group, is_mixed

ENTROPY_FLOOR_NATS = 0.02
MAX_LENGTH_GROWTH = 2.5
MAX_TRUNCATED_SHARE = 0.5
MAX_MASKED_SHARE = 0.5
STEPS_WITHOUT_CONTRAST = 5
"""Number of consecutive steps with only zero-variance groups before a warning."""
WINDOW = 5
"""Number of steps over which lengths are averaged, and of consecutive steps with a bad critic before a warning."""


def rollout_metrics(rollout_step: RolloutStep) -> dict[str, float]:
    """Metrics of the rollouts of one step, documented in docs/metrics.md."""
    rollouts = rollout_step.rollouts
    if not rollouts:
        return {"rollout/completions": 0.0, "rollout/prompts_too_long": float(rollout_step.num_prompts_too_long)}
    scored = [rollout for rollout in rollouts if rollout.reward is not None]
    rewards = [rollout.score.total for rollout in scored if rollout.score]
    lengths = [rollout.num_sampled_tokens for rollout in rollouts]
    groups = by_group(rollouts)
    equal = [[r.reward for r in group if r.reward is not None] for group in groups if not is_mixed(group)]
    metrics = {
        "reward/mean": statistics.fmean(rewards or [0.0]),
        "reward/std": statistics.pstdev(rewards or [0.0]),
        "group/mixed": sum(map(is_mixed, groups)) / len(groups),
        "group/all_high": sum(bool(rewards) and rewards[0] > 0 for rewards in equal) / len(groups),
        "group/all_zero": sum(bool(rewards) and rewards[0] <= 0 for rewards in equal) / len(groups),
        "group/trained": float(sum(group[0].is_trainable for group in groups)),
        "rollout/completions": float(len(rollouts)),
        "rollout/rounds": float(rollout_step.num_rounds),
        "rollout/mean_tokens": statistics.fmean(lengths),
        "rollout/max_tokens": float(max(lengths)),
        "rollout/truncated": sum(r.is_truncated for r in rollouts) / len(rollouts),
        "rollout/unscorable": 1 - len(scored) / len(rollouts),
        "rollout/prompts_too_long": float(rollout_step.num_prompts_too_long),
    }
    names = sorted({name for rollout in scored if rollout.score for name in rollout.score.parts})
    for name in names:
        metrics[f"reward/{name}"] = statistics.fmean(r.score.parts.get(name, 0.0) for r in scored if r.score)
    return metrics


def health_line(metrics: dict[str, float]) -> str:
    """The most important metrics of a step on one line."""
    columns = (
        ("reward", "reward/mean", ".3f"),
        ("format", "reward/format", ".2f"),
        ("mixed", "group/mixed", ".2f"),
        ("tokens", "rollout/mean_tokens", ".0f"),
        ("truncated", "rollout/truncated", ".2f"),
        ("entropy", "policy/entropy_nats", ".3f"),
        ("grad", "train/grad_norm", ".2f"),
        ("mismatch", "mismatch/mean_abs_nats", ".4f"),
        ("critic", "critic/explained_variance", ".2f"),
    )
    return "  ".join(f"{name} {metrics[key]:{spec}}" for name, key, spec in columns if key in metrics)


def early_warnings(history: Sequence[dict[str, float]]) -> dict[str, str]:
    """Warnings derived from the last rows of metrics, by name; empty if there are none."""
    if not history:
        return {}
    last, warnings = history[-1], {}
    if last.get("policy/entropy_nats", 1.0) < ENTROPY_FLOOR_NATS:
        warnings["entropy"] = (
            f"{last['policy/entropy_nats']:.4f} nats is below {ENTROPY_FLOOR_NATS}: completions hardly differ, so most "
            "groups have zero variance; lower the learning rate or raise loss.clip_high"
        )
    if last.get("rollout/truncated", 0.0) > MAX_TRUNCATED_SHARE:
        warnings["truncation"] = (
            f"{last['rollout/truncated']:.0%} of the completions are truncated at max_tokens; "
            "raise max_tokens of the stage, or check the rollouts for endless repetition"
        )
    if last.get("correction/masked", 0.0) > MAX_MASKED_SHARE:
        warnings["mismatch"] = (
            f"{last['correction/masked']:.0%} of the tokens are masked: engine and trainer disagree on most sampled "
            "tokens; check the mismatch/ metrics, use fp32, or raise loss.importance_cap"
        )
    explained = [row.get("critic/explained_variance", 0.0) for row in history[-WINDOW:]]
    if len(explained) == WINDOW and max(explained) < 0:
        warnings["critic"] = (
            f"for {WINDOW} steps the critic was worse than predicting the mean return; "
            "raise critic.prefit_steps or lower "
            "critic.learning_rate"
        )
    lengths = [row["rollout/mean_tokens"] for row in history if "rollout/mean_tokens" in row]
    if len(lengths) >= 3 * WINDOW:
        first, now = statistics.fmean(lengths[:WINDOW]), statistics.fmean(lengths[-WINDOW:])
        if now > MAX_LENGTH_GROWTH * first:
            warnings["length"] = (
                f"completions grew from {first:.0f} to {now:.0f} tokens; check the rollouts for repetition or filler"
            )
    tail = [row.get("group/mixed", 1.0) for row in history[-STEPS_WITHOUT_CONTRAST:]]
    if len(tail) == STEPS_WITHOUT_CONTRAST and max(tail) == 0:
        warnings["flat rewards"] = (
            f"for {STEPS_WITHOUT_CONTRAST} steps all groups had zero variance: the problems are all too hard or "
            "too easy, or the reward is wrong; check the rollouts"
        )
    return warnings
