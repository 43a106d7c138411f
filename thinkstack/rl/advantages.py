"""What an answer's reward is compared with: its group, the step, or a critic; and which answers are learnt from."""

from collections.abc import Sequence
from typing import NamedTuple

from thinkstack.rl.config import RLConfig
from thinkstack.rl.critic import Critic, Target
from thinkstack.rl.groups import (
    GROUP_KINDS,
    Advantage,
    advantages_of,
    is_truncated,
    normalized,
    overlong_punishment,
    returns_to_go,
    reward_of,
)
from thinkstack.types import Rollout

TokenPenalties = Sequence[Sequence[float]]
"""What is taken off the reward of each token of each answer."""


class RolloutAdvantages(NamedTuple):
    """The answers a step learns from."""

    rollouts: list[Rollout]
    advantages: list[Advantage]
    targets: list[Target]
    """What the critic learns from each; empty without one."""


def usable(rollouts: Sequence[Rollout], cfg: RLConfig) -> list[Rollout]:
    """Those that enter baselines; without a group to sit in, an unscorable answer has nothing to say."""
    needs_score = cfg.advantage not in GROUP_KINDS
    dropped = [rollout for rollout in rollouts if not (cfg.truncated == "drop" and is_truncated(rollout))]
    return [rollout for rollout in dropped if not (needs_score and reward_of(rollout) is None)]


def shaped_reward(rollout: Rollout, cfg: RLConfig) -> float | None:
    """The reward of an answer less the punishment of its length; None if it could not be scored."""
    reward = reward_of(rollout)
    if reward is None or not cfg.overlong_penalty:
        return reward
    length = len(rollout.completion.token_ids)
    return reward - cfg.overlong_penalty * overlong_punishment(length, cfg.max_tokens, cfg.overlong_share)


def token_rewards(reward: float | None, kl_penalties: Sequence[float]) -> list[float]:
    """Reward of each token: minus its penalty, and on the last one the reward of the answer."""
    assert reward is not None, "answers without a score are not usable here"
    return [-lost for lost in kl_penalties[:-1]] + [reward - kl_penalties[-1]]


def compute_advantages(
    rollouts: Sequence[Rollout],
    kl_penalties: TokenPenalties,
    cfg: RLConfig,
    critic: Critic | None = None,
    gae_lambda: float | None = None,
) -> RolloutAdvantages:
    """Advantages of usable answers. penalties: in the order of `rollouts`. lam: for the critic, in place of its own."""
    rewards = [shaped_reward(rollout, cfg) for rollout in rollouts]
    advantages: Sequence[Advantage]
    targets: list[Target] = []
    if cfg.advantage == "centered" or cfg.advantage == "standardized":
        totals = [
            None if earned is None else earned - sum(lost) for earned, lost in zip(rewards, kl_penalties, strict=True)
        ]
        advantages = advantages_of(rollouts, cfg.advantage, totals)
    else:
        by_token = [token_rewards(earned, lost) for earned, lost in zip(rewards, kl_penalties, strict=True)]
        if critic is None or not rollouts:
            advantages = normalized([returns_to_go(row) for row in by_token])
        else:
            advantages, targets = critic.estimate_advantages(rollouts, by_token, gae_lambda)
    kept = [i for i, rollout in enumerate(rollouts) if not (cfg.truncated == "mask" and is_truncated(rollout))]
    return RolloutAdvantages(
        [rollouts[i] for i in kept], [advantages[i] for i in kept], [targets[i] for i in kept if targets]
    )
