"""Advantages and batches of groups."""

import logging
from dataclasses import replace

import pytest
import torch

from tests.problems import make_problem
from thinkstack.rl.groups import advantages_within_groups, group_advantages, is_mixed, to_batch
from thinkstack.types import Completion, Rollout, Score

PROBLEM = make_problem()


def rollout(group: int, reward: float | None, ids: tuple[int, ...] = (5, 1), **changes: object) -> Rollout:
    completion = Completion(
        token_ids=ids,
        logprobs=tuple(-0.5 - i for i in range(len(ids))),
        finish_reason="stop",
        weights_version=0,
    )
    score = Score(total=0.0, unscorable="verifier died") if reward is None else Score(total=reward)
    return replace(
        Rollout(problem=PROBLEM, group_id=group, prompt_token_ids=(0, 7), completion=completion, score=score), **changes
    )


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
    assert advantages_within_groups(rollouts, "centered") == [0.5, -0.5, 0.0, 0.0]


def test_an_unscorable_completion_is_neither_wrong_nor_in_the_mean():
    """A verifier that timed out was counted as a wrong answer, and right completions beside it were over-rewarded."""
    assert group_advantages([1.0, 0.0, None], "centered") == [0.5, -0.5, 0.0]
    assert group_advantages([1.0, 0.0, None], "standardized") == [1.0, -1.0, 0.0]
    group = [rollout(0, 1.0), rollout(0, 0.0), rollout(0, None)]
    batch = to_batch(group, advantages_within_groups(group, "centered"), row_tokens=8)
    assert batch.loss_mask.sum() == 4  # two completions of two tokens


def test_a_group_is_mixed_only_by_scored_completions():
    assert is_mixed([rollout(0, 1.0), rollout(0, 0.0)])
    assert not is_mixed([rollout(0, 1.0), rollout(0, 1.0), rollout(0, None)])
    assert not is_mixed([rollout(0, None)])


def test_the_batch_holds_the_sampled_ids_and_trains_each_of_them():
    """Answers were decoded and encoded again, and the log-probabilities then belonged to other tokens."""
    sampled = (9, 9, 4, 1)
    group = [rollout(0, 1.0, sampled), rollout(0, 0.0, (6, 1))]
    batch = to_batch(group, [0.5, -0.5], row_tokens=5)
    row = next(r for r in range(2) if batch.loss_mask[r].sum() == 4)
    assert batch.ids[row].tolist() == [0, 7, 9, 9, 4]
    assert batch.targets[row].tolist() == [7, 9, 9, 4, 1]
    assert batch.loss_mask[row].tolist() == [0, 1, 1, 1, 1]
    assert batch.advantages is not None and batch.advantages[row].tolist() == [0, 0.5, 0.5, 0.5, 0.5]
    assert batch.rollout_logprobs is not None
    assert torch.equal(batch.rollout_logprobs[row], torch.tensor([0, -0.5, -1.5, -2.5, -3.5]))
