"""Rollouts collated into packed training batches; values of tokens in the layout of a batch and by rollout."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from thinkstack.data import SharedPromptGroup, collate, collate_values, pack
from thinkstack.rl.config import RLConfig
from thinkstack.types import Batch, Rollout


def minibatches(rollouts: Sequence[Rollout], cfg: RLConfig) -> list[Batch]:
    """The rollouts to train on in at most cfg.minibatches batches of complete groups, of about equal size.

    Unscorable rollouts are left out, with cfg.truncated="drop" truncated rollouts as well.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, rollout in enumerate(rollouts):
        is_dropped = cfg.truncated == "drop" and rollout.is_truncated
        if rollout.is_trainable and rollout.reward is not None and not is_dropped:
            groups[rollout.group_id].append(index)
    found = list(groups.values())
    parts = [list(itertools.chain(*found[part :: cfg.minibatches])) for part in range(cfg.minibatches)]
    return [pack_rollouts(rollouts, part, cfg.row_tokens, cfg.router_replay) for part in parts if part]


def pack_rollouts(
    rollouts: Sequence[Rollout], indices: Sequence[int], row_tokens: int, with_experts: bool = False
) -> Batch:
    """The rollouts at `indices` as packed rows, with the engine's log-probabilities and the column rollout_ids.

    The rows contain the sampled ids, never re-encoded text; each sampled token is trained, the end token included.
    Rollouts of a group that are in one row share the prompt, which is computed once. with_experts: whether to include
    the experts that the engine chose.
    """
    shared = shared_prompts([rollouts[index] for index in indices], row_tokens)
    documents = [
        SharedPromptGroup(
            members[0].prompt_token_ids,
            tuple(rollout.token_ids for rollout in members),
            tuple(rollout.loss_mask for rollout in members),
        )
        for members in shared
    ]
    width = max(row_tokens, *(document.width for document in documents))
    rows = pack(documents, width)
    batch = collate(documents, rows, width)
    logprobs = [
        [0.0] * (len(members[0].prompt_token_ids) - 1) + [value for rollout in members for value in rollout.logprobs]
        for members in shared
    ]
    positions, lengths = sampled_positions(batch)
    rollout_ids = torch.full_like(batch.ids, -1).flatten()
    rollout_ids[positions] = torch.tensor(indices).repeat_interleave(torch.tensor(lengths))
    return replace(
        batch,
        rollout_ids=rollout_ids.view_as(batch.ids),
        rollout_logprobs=collate_values(logprobs, documents, rows, width),
        experts=collate_experts(shared, batch) if with_experts else None,
    )


def shared_prompts(rollouts: Sequence[Rollout], row_tokens: int) -> list[list[Rollout]]:
    """Split rollouts into lists of consecutive rollouts of one group that share the prompt in a row, as many as fit
    row_tokens; the order is preserved."""
    shared: list[list[Rollout]] = []
    free_tokens, last_id = 0, None
    for rollout in rollouts:
        width = len(rollout.token_ids)
        if rollout.group_id != last_id or width > free_tokens:
            shared.append([])
            free_tokens, last_id = row_tokens - len(rollout.prompt_token_ids) + 1, rollout.group_id
        assert not shared[-1] or shared[-1][0].prompt_token_ids == rollout.prompt_token_ids, (
            "all rollouts of a group have the same prompt"
        )
        shared[-1].append(rollout)
        free_tokens -= width
    return shared


def collate_experts(shared: Sequence[Sequence[Rollout]], batch: Batch) -> Tensor:
    """The experts that the engine chose, in the layout of the batch: (R, T, L, K) int16, -1 in padding."""
    parts = []
    for members in shared:
        chosen = [rollout.completion.experts for rollout in members]
        prompt = len(members[0].prompt_token_ids) - 1
        assert all(experts is not None for experts in chosen), "the engine returned the experts of every token"
        parts += [chosen[0][:prompt], *(experts[prompt:] for experts in chosen)]  # type: ignore[index]
    flat = torch.cat(parts).short()
    documents, order = batch.document_ids.flatten().sort(stable=True)  # one document after another, in reading order
    positions = order[documents > 0]
    assert len(positions) == len(flat), "the engine returned the experts of every token"
    out = flat.new_full((documents.numel(), *flat.shape[1:]), -1)
    out[positions] = flat
    return out.unflatten(0, batch.ids.shape)


def sampled_positions(batch: Batch) -> tuple[Tensor, list[int]]:
    """Flat indices of all trained tokens, rollout by rollout in the order in which they were packed, and the number of
    tokens of each rollout."""
    index = batch.loss_mask.flatten().nonzero().squeeze(1)
    sequences = batch.sequence_ids.flatten()[index]
    order = sequences.argsort(stable=True)
    return index[order], sequences[order].unique_consecutive(return_counts=True)[1].tolist()


def rollouts_of(batch: Batch, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts of a batch in the order in which they were packed. rollouts: all rollouts of the step."""
    assert batch.rollout_ids is not None
    positions, _ = sampled_positions(batch)
    return [rollouts[index] for index in batch.rollout_ids.flatten()[positions].unique_consecutive().tolist()]


def mean_advantages(batches: Sequence[Batch]) -> dict[int, float]:
    """The mean advantage over the tokens of each trained rollout, by its index among the rollouts of the step."""
    found: dict[int, float] = {}
    for batch in batches:
        assert batch.rollout_ids is not None and batch.advantages is not None
        positions, lengths = sampled_positions(batch)
        ids = batch.rollout_ids.flatten()[positions].unique_consecutive().tolist()
        parts = batch.advantages.flatten()[positions].split(lengths)
        found |= {index: part.mean().item() for index, part in zip(ids, parts, strict=True)}
    return found


def gather_tokens(values: Tensor, batch: Batch) -> list[list[float]]:
    """Per-token values (R, T) of a batch as one list per rollout; the inverse of `scatter_tokens`."""
    positions, lengths = sampled_positions(batch)
    return [part.tolist() for part in values.flatten()[positions].split(lengths)]


def scatter_tokens(values: Sequence[Sequence[float]], batch: Batch) -> Tensor:
    """Per-token values of each rollout in the layout of the batch: (R, T) fp32, 0 elsewhere."""
    positions, lengths = sampled_positions(batch)
    assert [len(row) for row in values] == lengths, "one value per trained token"
    out = torch.zeros(batch.ids.numel())
    out[positions] = torch.tensor(list(itertools.chain(*values)), dtype=torch.float32)
    return out.view_as(batch.loss_mask)
