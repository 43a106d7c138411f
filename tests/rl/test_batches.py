"""Rollouts as packed batches, and the advantages of groups."""

import logging
from dataclasses import replace

import pytest
import torch

from tests.problems import make_problem
from tests.rl.bandit import arm_config
from thinkstack.rl.advantages import advantages_within_groups, group_advantages, with_advantages
from thinkstack.rl.batches import gather_tokens, minibatches, pack_rollouts, rollouts_of, scatter_tokens
from thinkstack.rl.rollout import is_mixed
from thinkstack.types import Batch, Completion, GivenTokens, Rollout, Score

PROBLEM = make_problem()


def rollout(group: int, reward: float | None, ids: tuple[int, ...] = (5, 1), **changes: object) -> Rollout:
    completion = Completion(
        token_ids=ids,
        logprobs=tuple(-0.5 - i for i in range(len(ids))),
        finish_reason="stop",
        weights_version=0,
    )
    score = Score(total=0.0, unscorable="verifier died") if reward is None else Score(total=reward)
    made = Rollout(problem=PROBLEM, group_id=group, prompt_token_ids=(0, 7), segments=(completion,), score=score)
    return replace(made, **changes)


def packed(rollouts: list[Rollout], row_tokens: int, advantages: list[float] | None = None) -> Batch:
    """All rollouts in one batch, with these advantages."""
    batch = pack_rollouts(rollouts, range(len(rollouts)), row_tokens)
    values = advantages or [0.0] * len(rollouts)
    rows = [[value] * len(r.completion.token_ids) for value, r in zip(values, rollouts, strict=True)]
    return replace(batch, advantages=scatter_tokens(rows, batch))


def test_rewards_equal_up_to_float_noise_give_exactly_zero():
    """Dividing by std + eps once blew the noise of 0.1 + 0.2 against 0.3 up to full advantages."""
    assert group_advantages([0.1 + 0.2, 0.3, 0.3], "standardized") == [0.0, 0.0, 0.0]
    assert group_advantages([1.0, 1.0], "centered") == [0.0, 0.0]


def test_the_deviation_is_that_of_the_population():
    """With two completions the sample deviation is larger by sqrt(2), and advantages silently shrink."""
    assert group_advantages([0.0, 1.0], "standardized") == [-1.0, 1.0]
    assert group_advantages([0.0, 0.0, 1.0, 1.0], "standardized") == [-1.0, -1.0, 1.0, 1.0]


def test_centered_advantages_are_not_scaled():
    assert group_advantages([0.0, 0.0, 0.0, 1.0], "centered") == [-0.25, -0.25, -0.25, 0.75]


def test_a_group_of_one_gets_zero_and_a_warning(caplog: pytest.LogCaptureFixture):
    """A lone answer was once trained on its raw reward."""
    with caplog.at_level(logging.WARNING):
        assert group_advantages([1.0], "centered") == [0.0]
    assert "no baseline" in caplog.text


def test_groups_are_told_apart_by_id_even_if_the_prompt_is_the_same():
    """Grouping by prompt text merged two groups that happened to sample the same problem."""
    rollouts = [rollout(0, 1.0), rollout(0, 0.0), rollout(1, 1.0), rollout(1, 1.0)]
    assert advantages_within_groups(rollouts, [1.0, 0.0, 1.0, 1.0], "centered") == [0.5, -0.5, 0.0, 0.0]


def test_an_unscorable_completion_is_neither_wrong_nor_in_the_mean():
    """A verifier that timed out was counted as a wrong answer, and right completions beside it were over-rewarded."""
    group = [rollout(0, 1.0), rollout(0, 0.0), rollout(0, None)]
    for kind, size in (("centered", 0.5), ("standardized", 1.0)):
        cfg = arm_config(advantage=kind)
        (batch,) = with_advantages(minibatches(group, cfg), group, cfg)
        assert batch.loss_mask.sum() == 4  # two completions of two tokens
        assert gather_tokens(batch.advantages, batch) == [[size, size], [-size, -size]]


def test_a_group_is_mixed_only_by_scored_completions():
    assert is_mixed([rollout(0, 1.0), rollout(0, 0.0)])
    assert not is_mixed([rollout(0, 1.0), rollout(0, 1.0), rollout(0, None)])
    assert not is_mixed([rollout(0, None)])


def test_the_batch_holds_the_sampled_ids_and_trains_each_of_them():
    """Answers were decoded and encoded again, and the log-probabilities then belonged to other tokens."""
    sampled = (9, 9, 4, 1)
    group = [rollout(0, 1.0, sampled), rollout(0, 0.0, (6, 1))]
    batch = packed(group, 5, [0.5, -0.5])
    row = next(r for r in range(2) if batch.loss_mask[r].sum() == 4)
    assert batch.ids[row].tolist() == [0, 7, 9, 9, 4]
    assert batch.targets[row].tolist() == [7, 9, 9, 4, 1]
    assert batch.loss_mask[row].tolist() == [0, 1, 1, 1, 1]
    assert batch.advantages is not None and batch.advantages[row].tolist() == [0, 0.5, 0.5, 0.5, 0.5]
    assert batch.rollout_logprobs is not None
    assert torch.equal(batch.rollout_logprobs[row], torch.tensor([0, -0.5, -1.5, -2.5, -3.5]))


def test_given_tokens_are_context_and_are_never_trained():
    """Trained on, a tool's reply teaches the model to invent replies."""
    first = Completion(token_ids=(8, 9), logprobs=(-1.0, -2.0), finish_reason="stop", weights_version=0)
    last = Completion(token_ids=(4, 1), logprobs=(-3.0, -4.0), finish_reason="stop", weights_version=0)
    turns = rollout(0, 1.0, segments=(first, GivenTokens((20, 21, 22)), last))
    group = [turns, rollout(0, 0.0, (6, 1))]
    cfg = arm_config(row_tokens=16)
    (batch,) = with_advantages(minibatches(group, cfg), group, cfg)
    mine = batch.branches[0] == 1
    assert batch.ids[0][mine].tolist() == [7, 8, 9, 20, 21, 22, 4]
    assert batch.targets[0][mine].tolist() == [8, 9, 20, 21, 22, 4, 1]
    assert batch.loss_mask[0][mine].tolist() == [1, 1, 0, 0, 0, 1, 1]
    assert batch.advantages[0][mine].tolist() == [0.5, 0.5, 0, 0, 0, 0.5, 0.5]
    assert batch.rollout_logprobs[0][mine].tolist() == [-1, -2, 0, 0, 0, -3, -4]
    assert batch.rollout_ids[0][mine].tolist() == [0, 0, -1, -1, -1, 0, 0]
    assert batch.weights.sum() == pytest.approx(1.0) and turns.num_sampled_tokens == 4


def test_minibatches_keep_groups_whole_and_lose_nothing():
    rollouts = [rollout(index % 5, float(index % 2), (5,) * (1 + index % 3)) for index in range(20)]
    batches = minibatches(rollouts, arm_config(minibatches=3))
    members = [rollouts_of(batch, rollouts) for batch in batches]
    assert sorted(map(len, members)) == [4, 8, 8]
    owners = [{r.group_id for r in part} for part in members]
    assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
    for batch, part in zip(batches, members, strict=True):
        assert [len(row) for row in gather_tokens(batch.targets, batch)] == [len(r.token_ids) for r in part]


def test_rollouts_that_are_not_trainable_are_not_packed():
    group = [rollout(0, 1.0), rollout(0, 0.0), rollout(1, 1.0, is_trainable=False), rollout(1, 1.0, is_trainable=False)]
    (batch,) = minibatches(group, arm_config())
    assert rollouts_of(batch, group) == group[:2]
    assert minibatches(group[2:], arm_config()) == []
