"""From scored groups to training batches: advantages, and rollouts as packed rows of tokens."""

import itertools
import logging
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from thinkstack.data import SharedPromptGroup, collate, collate_values, pack
from thinkstack.types import Batch, Rollout

log = logging.getLogger(__name__)

GroupKind = Literal["centered", "standardized"]
AdvantageKind = Literal["centered", "standardized", "batch", "gae"]
GROUP_KINDS: tuple[str, ...] = ("centered", "standardized")
Advantage = float | Sequence[float]
"""Of a whole answer, or of each of its tokens."""
SAME = 1e-6
"""Rewards that differ by less than this from their mean are the same reward."""


def group_advantages(rewards: Sequence[float | None], kind: GroupKind) -> list[float]:
    """Advantages of one group's answers.

    rewards: None marks an unscorable answer, which enters neither mean nor deviation and gets 0. "centered": reward
    minus the group's mean (arXiv:2503.20783). "standardized": that over the population standard deviation
    (arXiv:2402.03300, section 4.1.1; the paper prints no epsilon). Equal rewards, and a group of one, give 0 exactly.
    """
    scored = [reward for reward in rewards if reward is not None]
    if len(scored) < 2:
        log.warning("a group has %d scored answer(s): nothing to compare, its advantage is 0", len(scored))
        return [0.0] * len(rewards)
    mean = statistics.fmean(scored)
    if max(abs(reward - mean) for reward in scored) < SAME:
        return [0.0] * len(rewards)
    scale = statistics.pstdev(scored) if kind == "standardized" else 1.0
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


def advantages_of(
    rollouts: Sequence[Rollout], kind: GroupKind, rewards: Sequence[float | None] | None = None
) -> list[float]:
    """Advantage of each rollout within its group, in the order of `rollouts`; rewards: in place of their scores."""
    given = [reward_of(rollout) for rollout in rollouts] if rewards is None else rewards
    earned = {id(rollout): reward for rollout, reward in zip(rollouts, given, strict=True)}
    known: dict[int, float] = {}
    for group in by_group(rollouts):
        known |= zip(map(id, group), group_advantages([earned[id(rollout)] for rollout in group], kind), strict=True)
    return [known[id(rollout)] for rollout in rollouts]


def is_truncated(rollout: Rollout) -> bool:
    """Whether the engine cut the answer off; an end token in the last allowed place is no cut."""
    return rollout.completion.finish_reason == "length"


def overlong_punishment(num_tokens: int, max_tokens: int, share: float) -> float:
    """0 up to (1 - share) * max_tokens, then growing evenly to 1 at max_tokens (arXiv:2503.14476, equation 13)."""
    start = (1 - share) * max_tokens
    return max(0.0, (num_tokens - start) / (max_tokens - start))


def returns_to_go(rewards: Sequence[float]) -> list[float]:
    """Sum of the rewards of each token and all after it."""
    return list(itertools.accumulate(reversed(rewards)))[::-1]


def normalized(values: Sequence[Sequence[float]]) -> list[list[float]]:
    """Minus the mean, over the population deviation, of all tokens of the step (arXiv:2501.03262, equation 8).

    Equal values give 0 exactly. To be called on the whole step, before it is cut into mini- or micro-batches.
    """
    flat = list(itertools.chain(*values))
    mean = statistics.fmean(flat) if flat else 0.0
    if not flat or max(abs(value - mean) for value in flat) < SAME:
        return [[0.0] * len(row) for row in values]
    deviation = statistics.pstdev(flat, mean)
    return [[(value - mean) / deviation for value in row] for row in values]


def shared_prompt_groups(rollouts: Sequence[Rollout], row_tokens: int) -> list[list[Rollout]]:
    """Which answers share their prompt: neighbors of one group, as many as row_tokens takes. The order stays."""
    prompt_groups: list[list[Rollout]] = []
    room, last = 0, None
    for rollout in rollouts:
        width = len(rollout.completion.token_ids)
        if rollout.group_id != last or width > room:
            prompt_groups.append([])
            room, last = row_tokens - len(rollout.prompt_token_ids) + 1, rollout.group_id
        assert not prompt_groups[-1] or prompt_groups[-1][0].prompt_token_ids == rollout.prompt_token_ids, (
            "a group answers one prompt"
        )
        prompt_groups[-1].append(rollout)
        room -= width
    return prompt_groups


def to_batch(
    rollouts: Sequence[Rollout], advantages: Sequence[Advantage], row_tokens: int, with_experts: bool = False
) -> Batch:
    """Rollouts as packed rows with advantages and the engine's log-probabilities; unscorable answers are left out.

    The very ids that were drawn, never decoded and encoded again; each of them is trained, the end token too. Answers
    of a group that lie in one row share their prompt, which is computed once. with_experts: also the experts that the
    engine chose.
    """
    gain_of = {id(rollout): value for rollout, value in zip(rollouts, advantages, strict=True)}
    prompt_groups = shared_prompt_groups(
        [rollout for rollout in rollouts if reward_of(rollout) is not None], row_tokens
    )
    samples = [
        SharedPromptGroup(
            prompt_group[0].prompt_token_ids, tuple(rollout.completion.token_ids for rollout in prompt_group)
        )
        for prompt_group in prompt_groups
    ]
    width = max(row_tokens, *(sample.width for sample in samples))
    rows = pack(samples, width)

    def spread_values(of: Callable[[Rollout], Sequence[float]]) -> Tensor:
        values = [
            [0.0] * (len(f[0].prompt_token_ids) - 1) + [v for rollout in f for v in of(rollout)] for f in prompt_groups
        ]
        return collate_values(values, samples, rows, width)

    batch = collate(samples, rows, width)
    return replace(
        batch,
        advantages=spread_values(lambda r: per_token(gain_of[id(r)], len(r.completion.token_ids))),
        rollout_logprobs=spread_values(lambda r: r.completion.logprobs),
        experts=spread_experts(prompt_groups, batch) if with_experts else None,
    )


def spread_experts(prompt_groups: Sequence[Sequence[Rollout]], batch: Batch) -> Tensor:
    """The engine's experts of each answer, laid out like the batch: (R, T, L, K) int16, -1 in padding."""
    parts = []
    for prompt_group in prompt_groups:
        chosen = [rollout.completion.experts for rollout in prompt_group]
        shared = len(prompt_group[0].prompt_token_ids) - 1
        assert all(experts is not None for experts in chosen), "the engine returned the experts of every token"
        parts += [chosen[0][:shared], *(experts[shared:] for experts in chosen)]  # type: ignore[index]
    known = torch.cat(parts).short()
    documents, order = batch.document_ids.flatten().sort(stable=True)  # fork by fork, in reading order
    places = order[documents > 0]
    assert len(places) == len(known), "the engine returned the experts of every token"
    out = known.new_full((documents.numel(), *known.shape[1:]), -1)
    out[places] = known
    return out.unflatten(0, batch.ids.shape)


def per_token(advantage: Advantage, num_tokens: int) -> list[float]:
    """An answer's advantage for each of its tokens."""
    values = [advantage] * num_tokens if isinstance(advantage, float | int) else list(advantage)
    assert len(values) == num_tokens, "one advantage a token"
    return values


def trained_places(batch: Batch) -> tuple[Tensor, list[int]]:
    """Flat places of all trained tokens, answer by answer in drawing order, and how many each answer has."""
    index = batch.loss_mask.flatten().nonzero().squeeze(1)
    sequences = batch.sequence_ids.flatten()[index]
    order = sequences.argsort(stable=True)
    return index[order], sequences[order].unique_consecutive(return_counts=True)[1].tolist()


def gather_tokens(values: Tensor, batch: Batch) -> list[list[float]]:
    """Per-token numbers (R, T) of a batch, answer by answer; the other way round is `spread_tokens`."""
    places, lengths = trained_places(batch)
    return [part.tolist() for part in values.flatten()[places].split(lengths)]


def spread_tokens(values: Sequence[Sequence[float]], batch: Batch) -> Tensor:
    """Per-token numbers of each answer of a batch, laid out like it: (R, T) fp32, 0 elsewhere."""
    places, lengths = trained_places(batch)
    assert [len(row) for row in values] == lengths, "one number a trained token"
    out = torch.zeros(batch.ids.numel())
    out[places] = torch.tensor(list(itertools.chain(*values)), dtype=torch.float32)
    return out.view_as(batch.loss_mask)
