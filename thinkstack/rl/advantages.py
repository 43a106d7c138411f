"""What an answer's reward is compared with: its group, the step, or a critic; and which answers are learnt from."""

from collections.abc import Sequence
from typing import NamedTuple

from thinkstack.rl.config import GrpoConfig
from thinkstack.rl.critic import Critic, Target
from thinkstack.rl.groups import (
    GROUP_KINDS,
    Advantage,
    advantages_of,
    is_truncated,
    normalised,
    overlong_punishment,
    returns_to_go,
    reward_of,
)
from thinkstack.types import Rollout

Penalties = Sequence[Sequence[float]]
"""What is taken off the reward of each token of each answer."""


class Learnt(NamedTuple):
    """The answers a step learns from."""

    rollouts: list[Rollout]
    advantages: list[Advantage]
    targets: list[Target]
    """What the critic learns from each; empty without one."""


def usable(rollouts: Sequence[Rollout], cfg: GrpoConfig) -> list[Rollout]:
    """Those that enter baselines; without a group to sit in, an unscorable answer has nothing to say."""
    needs_score = cfg.advantage not in GROUP_KINDS
    dropped = [rollout for rollout in rollouts if not (cfg.truncated == "drop" and is_truncated(rollout))]
    return [rollout for rollout in dropped if not (needs_score and reward_of(rollout) is None)]


def shaped_reward(rollout: Rollout, cfg: GrpoConfig) -> float | None:
    """The reward of an answer less the punishment of its length; None if it could not be scored."""
    reward = reward_of(rollout)
    if reward is None or not cfg.overlong_penalty:
        return reward
    length = len(rollout.completion.token_ids)
    return reward - cfg.overlong_penalty * overlong_punishment(length, cfg.max_tokens, cfg.overlong_share)


def token_rewards(reward: float | None, penalties: Sequence[float]) -> list[float]:
    """Reward of each token: minus its penalty, and on the last one the reward of the answer."""
    assert reward is not None, "answers without a score are not usable here"
    return [-lost for lost in penalties[:-1]] + [reward - penalties[-1]]


def compare(
    rollouts: Sequence[Rollout],
    penalties: Penalties,
    cfg: GrpoConfig,
    critic: Critic | None = None,
    lam: float | None = None,
) -> Learnt:
    """Advantages of usable answers. penalties: in the order of `rollouts`. lam: for the critic, in place of its own."""
    rewards = [shaped_reward(rollout, cfg) for rollout in rollouts]
    advantages: Sequence[Advantage]
    targets: list[Target] = []
    if cfg.advantage == "centred" or cfg.advantage == "standardised":
        totals = [
            None if earned is None else earned - sum(lost) for earned, lost in zip(rewards, penalties, strict=True)
        ]
        advantages = advantages_of(rollouts, cfg.advantage, totals)
    else:
        by_token = [token_rewards(earned, lost) for earned, lost in zip(rewards, penalties, strict=True)]
        if critic is None or not rollouts:
            advantages = normalised([returns_to_go(row) for row in by_token])
        else:
            advantages, targets = critic.judge(rollouts, by_token, lam)
    kept = [i for i, rollout in enumerate(rollouts) if not (cfg.truncated == "mask" and is_truncated(rollout))]
    return Learnt([rollouts[i] for i in kept], [advantages[i] for i in kept], [targets[i] for i in kept if targets])
