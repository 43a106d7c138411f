"""Advantages of the rollouts of a step, with the baseline of the group, the step or a critic."""

import itertools
import logging
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

from thinkstack.rl.batches import gather_tokens, rollouts_of, scatter_tokens
from thinkstack.rl.config import GROUP_KINDS, GroupKind, RLConfig
from thinkstack.rl.rollout import REWARD_TOLERANCE
from thinkstack.train.loss import token_weights
from thinkstack.train.value_loss import gae
from thinkstack.types import Batch, Rollout

log = logging.getLogger(__name__)


def with_advantages(
    batches: Sequence[Batch], rollouts: Sequence[Rollout], cfg: RLConfig, gae_lambda: float | None = None
) -> list[Batch]:
    """The batches of a step with advantages and token weights, and with returns if they have values of a critic.

    All batches together are the step: baselines and deviations are computed over all of them. rollouts: all rollouts
    of the step. gae_lambda: overrides cfg.critic.gae_lambda. With cfg.truncated="mask", truncated rollouts are part of
    the baseline and are not trained. Batches without trained tokens are left out.
    """
    members = [rollouts_of(batch, rollouts) for batch in batches]
    everyone = list(itertools.chain(*members))
    rewards = [shaped_reward(rollout, cfg) for rollout in everyone]
    token_penalties = [row for batch in batches for row in kl_penalties(batch, cfg)]
    returns: list[list[float]] = []
    if cfg.advantage in GROUP_KINDS:
        totals = [reward - sum(row) for reward, row in zip(rewards, token_penalties, strict=True)]
        by_rollout = advantages_within_groups(everyone, totals, cfg.advantage)  # type: ignore[arg-type]
        advantages = [[value] * len(row) for value, row in zip(by_rollout, token_penalties, strict=True)]
    else:
        by_token = [token_rewards(reward, row) for reward, row in zip(rewards, token_penalties, strict=True)]
        values = [row for batch in batches if batch.values is not None for row in gather_tokens(batch.values, batch)]
        if values:
            gamma, gae_lambda = cfg.critic.gamma, cfg.critic.gae_lambda if gae_lambda is None else gae_lambda
            advantages = [gae(r, v, gamma, gae_lambda) for r, v in zip(by_token, values, strict=True)]
            returns = [[a + v for a, v in zip(*rows, strict=True)] for rows in zip(advantages, values, strict=True)]
            advantages = whiten(advantages) if cfg.critic.whiten else advantages
        else:
            advantages = whiten([returns_to_go(row) for row in by_token])
    found, done = [], 0
    for batch, own in zip(batches, members, strict=True):
        part = slice(done, done := done + len(own))
        batch = replace(batch, advantages=scatter_tokens(advantages[part], batch))
        if returns:
            batch = replace(batch, returns=scatter_tokens(returns[part], batch))
        if cfg.truncated == "mask":
            is_kept = [[float(not rollout.is_truncated)] * rollout.num_sampled_tokens for rollout in own]
            batch = replace(batch, loss_mask=scatter_tokens(is_kept, batch))
        if bool(batch.loss_mask.any()):
            found.append(batch.with_weights(token_weights(batch, cfg.loss.reduction, cfg.max_tokens)))
    return found


def kl_penalties(batch: Batch, cfg: RLConfig) -> list[list[float]]:
    """For each rollout of a batch, the penalty subtracted from the reward of each token; 0 unless KL is part of the
    reward."""
    return gather_tokens(torch.zeros_like(batch.loss_mask) if batch.kl is None else cfg.loss.kl * batch.kl, batch)


def shaped_reward(rollout: Rollout, cfg: RLConfig) -> float:
    """The reward of a rollout minus its overlong penalty."""
    assert rollout.reward is not None, "a batch contains no unscorable rollouts"
    if not cfg.overlong_penalty:
        return rollout.reward
    length = rollout.num_sampled_tokens
    return rollout.reward - cfg.overlong_penalty * overlong_punishment(length, cfg.max_tokens, cfg.overlong_share)


def overlong_punishment(num_tokens: int, max_tokens: int, share: float) -> float:
    """0 up to (1 - share) * max_tokens, then linear up to 1 at max_tokens (arXiv:2503.14476, equation 13)."""
    start = (1 - share) * max_tokens
    return max(0.0, (num_tokens - start) / (max_tokens - start))


def advantages_within_groups(rollouts: Sequence[Rollout], rewards: Sequence[float], kind: GroupKind) -> list[float]:
    """Advantage of each rollout within its group, in the order of `rollouts`. rewards: one per rollout."""
    members: dict[int, list[int]] = defaultdict(list)
    for index, rollout in enumerate(rollouts):
        members[rollout.group_id].append(index)
    advantages = [0.0] * len(rollouts)
    for indices in members.values():
        found = group_advantages([rewards[index] for index in indices], kind)
        for index, advantage in zip(indices, found, strict=True):
            advantages[index] = advantage
    return advantages


def group_advantages(rewards: Sequence[float], kind: GroupKind) -> list[float]:
    """Advantages of the rollouts of one group.

    kind="centered": reward minus the mean of the group (arXiv:2503.20783). kind="standardized": the centered reward
    divided by the population standard deviation (arXiv:2402.03300, section 4.1.1; the paper has no epsilon).
    Zero-variance groups and groups of one rollout get exactly 0.
    """
    if len(rewards) < 2:
        log.warning("a group has %d scored rollout(s), so there is no baseline and its advantages are 0", len(rewards))
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    if max(abs(reward - mean) for reward in rewards) < REWARD_TOLERANCE:
        return [0.0] * len(rewards)
    scale = statistics.pstdev(rewards) if kind == "standardized" else 1.0
    return [(reward - mean) / scale for reward in rewards]


def token_rewards(reward: float, token_penalties: Sequence[float]) -> list[float]:
    """Reward of each token: minus the KL penalty of the token, plus the reward of the rollout at the last token."""
    return [-penalty for penalty in token_penalties[:-1]] + [reward - token_penalties[-1]]


def returns_to_go(rewards: Sequence[float]) -> list[float]:
    """For each token, the sum of its reward and the rewards of all later tokens."""
    return list(itertools.accumulate(reversed(rewards)))[::-1]


def whiten(values: Sequence[Sequence[float]]) -> list[list[float]]:
    """Subtract the mean of all tokens and divide by their population standard deviation (arXiv:2501.03262, equation 8).

    Equal values give exactly 0. Call this for an entire step, before it is split into mini- or micro-batches.
    """
    flat = list(itertools.chain(*values))
    mean = statistics.fmean(flat) if flat else 0.0
    if not flat or max(abs(value - mean) for value in flat) < REWARD_TOLERANCE:
        return [[0.0] * len(row) for row in values]
    deviation = statistics.pstdev(flat, mean)
    return [[(value - mean) / deviation for value in row] for row in values]
