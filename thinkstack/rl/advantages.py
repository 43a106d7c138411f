"""Advantages of the rollouts of a step, with the baseline of the group, the step or a critic."""

from collections.abc import Sequence
from typing import NamedTuple

from thinkstack.rl.config import RLConfig
from thinkstack.rl.critic import Critic, ValueTarget
from thinkstack.rl.groups import (
    GROUP_KINDS,
    Advantage,
    advantages_within_groups,
    is_truncated,
    overlong_punishment,
    returns_to_go,
    reward_of,
    whiten,
)
from thinkstack.types import Rollout

KLPenalties = Sequence[Sequence[float]]
"""For each completion, the KL penalty subtracted from the reward of each token."""


class RolloutAdvantages(NamedTuple):
    """The rollouts that a step trains on, with their advantages."""

    rollouts: list[Rollout]
    advantages: list[Advantage]
    """One entry per rollout."""
    value_targets: list[ValueTarget]
    """Training targets of the critic, one per rollout; empty without a critic."""


def select_rollouts(rollouts: Sequence[Rollout], cfg: RLConfig) -> list[Rollout]:
    """The rollouts that are used for the baseline.

    cfg.truncated="drop" removes truncated completions. If the advantage does not use the group, unscorable rollouts are
    removed as well.
    """
    needs_score = cfg.advantage not in GROUP_KINDS
    selected = [rollout for rollout in rollouts if not (cfg.truncated == "drop" and is_truncated(rollout))]
    return [rollout for rollout in selected if not (needs_score and reward_of(rollout) is None)]


def shaped_reward(rollout: Rollout, cfg: RLConfig) -> float | None:
    """The reward of a completion minus its overlong penalty; None if it is unscorable."""
    reward = reward_of(rollout)
    if reward is None or not cfg.overlong_penalty:
        return reward
    length = len(rollout.completion.token_ids)
    return reward - cfg.overlong_penalty * overlong_punishment(length, cfg.max_tokens, cfg.overlong_share)


def token_rewards(reward: float | None, kl_penalties: Sequence[float]) -> list[float]:
    """Reward of each token: minus the KL penalty of the token, plus the reward of the completion at the last token."""
    assert reward is not None, "select_rollouts removes unscorable rollouts"
    return [-penalty for penalty in kl_penalties[:-1]] + [reward - kl_penalties[-1]]


def compute_advantages(
    rollouts: Sequence[Rollout],
    kl_penalties: KLPenalties,
    cfg: RLConfig,
    critic: Critic | None = None,
    gae_lambda: float | None = None,
) -> RolloutAdvantages:
    """Advantages of selected rollouts.

    kl_penalties: in the order of `rollouts`. gae_lambda: overrides cfg.critic.gae_lambda.
    """
    rewards = [shaped_reward(rollout, cfg) for rollout in rollouts]
    advantages: Sequence[Advantage]
    value_targets: list[ValueTarget] = []
    if cfg.advantage == "centered" or cfg.advantage == "standardized":
        totals = [
            None if reward is None else reward - sum(token_penalties)
            for reward, token_penalties in zip(rewards, kl_penalties, strict=True)
        ]
        advantages = advantages_within_groups(rollouts, cfg.advantage, totals)
    else:
        by_token = [
            token_rewards(reward, token_penalties)
            for reward, token_penalties in zip(rewards, kl_penalties, strict=True)
        ]
        if critic is None or not rollouts:
            advantages = whiten([returns_to_go(row) for row in by_token])
        else:
            advantages, value_targets = critic.estimate_advantages(rollouts, by_token, gae_lambda)
    trained = [i for i, rollout in enumerate(rollouts) if not (cfg.truncated == "mask" and is_truncated(rollout))]
    return RolloutAdvantages(
        [rollouts[i] for i in trained],
        [advantages[i] for i in trained],
        [value_targets[i] for i in trained if value_targets],
    )
