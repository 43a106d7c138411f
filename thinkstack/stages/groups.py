"""From scored groups to training batches: advantages, and rollouts as packed rows of tokens."""

import logging
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from thinkstack.data import Sample, lay_out, pack, spread
from thinkstack.types import Batch, Rollout

log = logging.getLogger(__name__)

AdvantageKind = Literal["centred", "standardised"]
SAME = 1e-6
"""Rewards that differ by less than this from their mean are the same reward."""


def group_advantages(rewards: Sequence[float | None], kind: AdvantageKind) -> list[float]:
    """Advantages of one group's answers.

    rewards: None marks an unscorable answer, which enters neither mean nor deviation and gets 0. "centred": reward
    minus the group's mean (arXiv:2503.20783). "standardised": that over the population standard deviation
    (arXiv:2402.03300, section 4.1.1; the paper prints no epsilon). Equal rewards, and a group of one, give 0 exactly.
    """
    scored = [reward for reward in rewards if reward is not None]
    if len(scored) < 2:
        log.warning("a group has %d scored answer(s): nothing to compare, its advantage is 0", len(scored))
        return [0.0] * len(rewards)
    mean = statistics.fmean(scored)
    if max(abs(reward - mean) for reward in scored) < SAME:
        return [0.0] * len(rewards)
    scale = statistics.pstdev(scored) if kind == "standardised" else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]


def reward_of(rollout: Rollout) -> float | None:
    """The number an answer is trained on; None if it could not be scored."""
    assert rollout.score is not None, "rollouts are scored before they are compared"
    return None if rollout.score.unscorable else rollout.score.total


def by_group(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """Rollouts that share a group id, in the order in which the ids appear."""
    groups: dict[int, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.group_id].append(rollout)
    return list(groups.values())


def is_mixed(group: Sequence[Rollout]) -> bool:
    """Whether a group teaches something: its scored answers did not all earn the same."""
    rewards = [reward for reward in map(reward_of, group) if reward is not None]
    return bool(rewards) and max(rewards) - min(rewards) > SAME


def advantages_of(rollouts: Sequence[Rollout], kind: AdvantageKind) -> list[float]:
    """Advantage of each rollout within its group, in the order of `rollouts`."""
    known: dict[int, float] = {}
    for group in by_group(rollouts):
        known |= zip(map(id, group), group_advantages([reward_of(rollout) for rollout in group], kind), strict=True)
    return [known[id(rollout)] for rollout in rollouts]


def sample_of(rollout: Rollout) -> Sample:
    """The very ids that were drawn, never decoded and encoded again; each of them is trained, the end token too."""
    prompt, drawn = rollout.prompt_ids, rollout.completion.token_ids
    return Sample((*prompt, *drawn), (0,) * len(prompt) + (1,) * len(drawn))


def to_batch(rollouts: Sequence[Rollout], advantages: Sequence[float], row_tokens: int) -> Batch:
    """Rollouts as packed rows with advantages and the engine's log-probabilities; unscorable answers are left out."""
    kept = [
        (rollout, value) for rollout, value in zip(rollouts, advantages, strict=True) if reward_of(rollout) is not None
    ]
    samples = [sample_of(rollout) for rollout, _ in kept]
    width = max(row_tokens, *(sample.width for sample in samples))
    rows = pack(samples, width)
    before = [[0.0] * (len(rollout.prompt_ids) - 1) for rollout, _ in kept]
    drawn = [[*zeros, *rollout.completion.log_probs] for zeros, (rollout, _) in zip(before, kept, strict=True)]
    gains = [
        [*zeros, *[value] * len(rollout.completion.token_ids)]
        for zeros, (rollout, value) in zip(before, kept, strict=True)
    ]
    batch = lay_out(samples, rows, width)
    return Batch(
        **vars(batch)
        | {
            "advantages": spread(gains, samples, rows, width),
            "rollout_log_probs": spread(drawn, samples, rows, width),
        }
    )
