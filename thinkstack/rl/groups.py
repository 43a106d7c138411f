"""Advantages within groups, and rollouts collated into packed training batches."""

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
"""Advantage of a completion, or of each token of a completion."""
REWARD_TOLERANCE = 1e-6
"""Rewards that differ from their mean by at most this count as equal."""


def group_advantages(rewards: Sequence[float | None], kind: GroupKind) -> list[float]:
    """Advantages of the completions of one group.

    rewards: None marks an unscorable completion, which is excluded from mean and deviation and gets 0.
    kind="centered": reward minus the mean of the group (arXiv:2503.20783). kind="standardized": the centered reward
    divided by the population standard deviation (arXiv:2402.03300, section 4.1.1; the paper has no epsilon).
    Zero-variance groups and groups of one completion get exactly 0.
    """
    scored = [reward for reward in rewards if reward is not None]
    if len(scored) < 2:
        log.warning(
            "a group has %d scored completion(s), so there is no baseline and its advantages are 0", len(scored)
        )
        return [0.0] * len(rewards)
    mean = statistics.fmean(scored)
    if max(abs(reward - mean) for reward in scored) < REWARD_TOLERANCE:
        return [0.0] * len(rewards)
    scale = statistics.pstdev(scored) if kind == "standardized" else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]


def reward_of(rollout: Rollout) -> float | None:
    """The reward of a completion; None if it is unscorable."""
    assert rollout.score is not None, "rollouts are scored before advantages are computed"
    return None if rollout.score.unscorable else rollout.score.total


def by_group(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    """The rollouts of each group id, in the order in which the ids first appear."""
    groups: dict[int, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.group_id].append(rollout)
    return list(groups.values())


def is_mixed(group: Sequence[Rollout]) -> bool:
    """Whether the scored completions of a group have different rewards (not a zero-variance group)."""
    rewards = [reward for reward in map(reward_of, group) if reward is not None]
    return bool(rewards) and max(rewards) - min(rewards) > REWARD_TOLERANCE


def advantages_within_groups(
    rollouts: Sequence[Rollout], kind: GroupKind, rewards: Sequence[float | None] | None = None
) -> list[float]:
    """Advantage of each rollout within its group, in the order of `rollouts`. rewards: used instead of the scores."""
    if rewards is None:
        rewards = [reward_of(rollout) for rollout in rollouts]
    reward_by_id = {id(rollout): reward for rollout, reward in zip(rollouts, rewards, strict=True)}
    advantages: dict[int, float] = {}
    for group in by_group(rollouts):
        ids = list(map(id, group))
        advantages |= zip(ids, group_advantages([reward_by_id[i] for i in ids], kind), strict=True)
    return [advantages[id(rollout)] for rollout in rollouts]


def is_truncated(rollout: Rollout) -> bool:
    """Whether the completion reached the length limit without a stop token."""
    return rollout.completion.finish_reason == "length"


def overlong_punishment(num_tokens: int, max_tokens: int, share: float) -> float:
    """0 up to (1 - share) * max_tokens, then linear up to 1 at max_tokens (arXiv:2503.14476, equation 13)."""
    start = (1 - share) * max_tokens
    return max(0.0, (num_tokens - start) / (max_tokens - start))


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


def shared_prompt_groups(rollouts: Sequence[Rollout], row_tokens: int) -> list[list[Rollout]]:
    """Split rollouts into lists of consecutive completions of one group that share the prompt in a row, as many as fit
    row_tokens; the order is preserved."""
    prompt_groups: list[list[Rollout]] = []
    free_tokens, last_id = 0, None
    for rollout in rollouts:
        width = len(rollout.completion.token_ids)
        if rollout.group_id != last_id or width > free_tokens:
            prompt_groups.append([])
            free_tokens, last_id = row_tokens - len(rollout.prompt_token_ids) + 1, rollout.group_id
        assert not prompt_groups[-1] or prompt_groups[-1][0].prompt_token_ids == rollout.prompt_token_ids, (
            "all rollouts of a group have the same prompt"
        )
        prompt_groups[-1].append(rollout)
        free_tokens -= width
    return prompt_groups


def to_batch(
    rollouts: Sequence[Rollout], advantages: Sequence[Advantage], row_tokens: int, with_experts: bool = False
) -> Batch:
    """Rollouts as packed rows with advantages and the engine's log-probabilities; unscorable rollouts are left out.

    The rows contain the sampled ids, never re-encoded text; each sampled token is trained, the end token included.
    Completions of a group that are in one row share the prompt, which is computed once. with_experts: whether to
    include the experts that the engine chose.
    """
    advantage_by_id = {id(rollout): value for rollout, value in zip(rollouts, advantages, strict=True)}
    prompt_groups = shared_prompt_groups(
        [rollout for rollout in rollouts if reward_of(rollout) is not None], row_tokens
    )
    sequences = [
        SharedPromptGroup(
            prompt_group[0].prompt_token_ids, tuple(rollout.completion.token_ids for rollout in prompt_group)
        )
        for prompt_group in prompt_groups
    ]
    width = max(row_tokens, *(sequence.width for sequence in sequences))
    rows = pack(sequences, width)

    def collate_column(get: Callable[[Rollout], Sequence[float]]) -> Tensor:
        values = [
            [0.0] * (len(group[0].prompt_token_ids) - 1) + [v for rollout in group for v in get(rollout)]
            for group in prompt_groups
        ]
        return collate_values(values, sequences, rows, width)

    batch = collate(sequences, rows, width)
    return replace(
        batch,
        advantages=collate_column(lambda r: token_advantages(advantage_by_id[id(r)], len(r.completion.token_ids))),
        rollout_logprobs=collate_column(lambda r: r.completion.logprobs),
        experts=collate_experts(prompt_groups, batch) if with_experts else None,
    )


def collate_experts(prompt_groups: Sequence[Sequence[Rollout]], batch: Batch) -> Tensor:
    """The experts that the engine chose, in the layout of the batch: (R, T, L, K) int16, -1 in padding."""
    parts = []
    for prompt_group in prompt_groups:
        chosen = [rollout.completion.experts for rollout in prompt_group]
        shared = len(prompt_group[0].prompt_token_ids) - 1
        assert all(experts is not None for experts in chosen), "the engine returned the experts of every token"
        parts += [chosen[0][:shared], *(experts[shared:] for experts in chosen)]  # type: ignore[index]
    flat = torch.cat(parts).short()
    documents, order = batch.document_ids.flatten().sort(
        stable=True
    )  # one prompt group after another, in reading order
    positions = order[documents > 0]
    assert len(positions) == len(flat), "the engine returned the experts of every token"
    out = flat.new_full((documents.numel(), *flat.shape[1:]), -1)
    out[positions] = flat
    return out.unflatten(0, batch.ids.shape)


def token_advantages(advantage: Advantage, num_tokens: int) -> list[float]:
    """The advantage of each token of a completion."""
    values = [advantage] * num_tokens if isinstance(advantage, float | int) else list(advantage)
    assert len(values) == num_tokens, "one advantage per token"
    return values


def trained_positions(batch: Batch) -> tuple[Tensor, list[int]]:
    """Flat indices of all trained tokens, completion by completion in the order of the rollouts, and the number of
    tokens of each completion."""
    index = batch.loss_mask.flatten().nonzero().squeeze(1)
    sequences = batch.sequence_ids.flatten()[index]
    order = sequences.argsort(stable=True)
    return index[order], sequences[order].unique_consecutive(return_counts=True)[1].tolist()


def gather_tokens(values: Tensor, batch: Batch) -> list[list[float]]:
    """Per-token values (R, T) of a batch as one list per completion; the inverse of `scatter_tokens`."""
    positions, lengths = trained_positions(batch)
    return [part.tolist() for part in values.flatten()[positions].split(lengths)]


def scatter_tokens(values: Sequence[Sequence[float]], batch: Batch) -> Tensor:
    """Per-token values of each completion in the layout of the batch: (R, T) fp32, 0 elsewhere."""
    positions, lengths = trained_positions(batch)
    assert [len(row) for row in values] == lengths, "one value per trained token"
    out = torch.zeros(batch.ids.numel())
    out[positions] = torch.tensor(list(itertools.chain(*values)), dtype=torch.float32)
    return out.view_as(batch.loss_mask)
