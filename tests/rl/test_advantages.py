"""What completions are compared with, by hand."""

import math
from dataclasses import replace

import pytest
import torch

from tests.rl.bandit import arm_config
from tests.rl.test_batches import packed, rollout
from thinkstack.rl.advantages import overlong_punishment, returns_to_go, token_rewards, whiten, with_advantages
from thinkstack.rl.batches import gather_tokens, minibatches, rollouts_of, scatter_tokens
from thinkstack.train.loss import token_weights
from thinkstack.train.policy_loss import PolicyLossConfig
from thinkstack.types import Rollout

BATCH = {"advantage": "batch", "dynamic_sampling": False}


def truncated(completed: Rollout) -> Rollout:
    """The same answer, cut off by the engine."""
    return replace(completed, segments=(replace(completed.completion, finish_reason="length"),))


def advantages_of(rollouts: list[Rollout], kl: list[list[float]] | None = None, **changes: object):
    """The advantage of each token of each trained rollout. kl: estimate for each token, as part of the reward."""
    cfg = arm_config(**(changes | ({"loss": IN_REWARD} if kl else {})))
    batches = minibatches(rollouts, cfg)
    if kl:
        batches = [
            replace(b, kl=scatter_tokens([kl[rollouts.index(r)] for r in rollouts_of(b, rollouts)], b)) for b in batches
        ]
    return [row for batch in with_advantages(batches, rollouts, cfg) for row in gather_tokens(batch.advantages, batch)]


def first_of(rows: list[list[float]]) -> list[float]:
    """The advantage of each rollout, which all its tokens share."""
    assert all(set(row) == {row[0]} for row in rows)
    return [row[0] for row in rows]


IN_REWARD = PolicyLossConfig(kl=1.0, kl_estimator="k1", kl_placement="reward")
TRUNCATED = {
    # rewards 1, 0 and (cut off) 0: mean 1/3; without the last one mean 1/2
    "keep": ([2 / 3, -1 / 3, -1 / 3], 3),
    "mask": ([2 / 3, -1 / 3], 2),
    "drop": ([1 / 2, -1 / 2], 2),
}


@pytest.mark.parametrize("how", TRUNCATED)
def test_truncated_completions_are_kept_masked_or_dropped_as_configured(how):
    """Peers differ and rarely say: in baseline and loss, in the baseline only, or in neither, where the group must be
    compared anew. Masked, their zeros still lower the baseline, and every finished answer gains from them."""
    group = [rollout(0, 1.0), rollout(0, 0.0), truncated(rollout(0, 0.0))]
    advantages, count = TRUNCATED[how]
    found = advantages_of(group, truncated=how)
    assert first_of(found) == pytest.approx(advantages) and sum(map(len, found)) == 2 * count


def test_a_step_of_only_truncated_completions_trains_nothing():
    """An epidemic of long completions once left a batch of zero rows, and the mean of nothing is nan."""
    group = [truncated(rollout(0, 1.0)), truncated(rollout(0, 0.0))]
    for how in ("mask", "drop"):
        assert advantages_of(group, truncated=how) == []
    assert minibatches([], arm_config(minibatches=2)) == []


def test_the_deviation_of_the_step_is_taken_over_the_whole_step():
    """A deviation per micro-batch rescales each by its own luck.

    Rewards 1, 0 (group 0) and 1, 1 (group 1), two tokens each: mean 3/4, variance (3 * 1/16 + 9/16) / 4 = 3/16. Group 1
    is all right and still gains, (1 - 3/4) / sqrt(3/16) = 1/sqrt 3, where its own mean would have given 0.
    """
    rollouts = [rollout(0, 1.0), rollout(0, 0.0), rollout(1, 1.0), rollout(1, 1.0)]
    up, down = 1 / math.sqrt(3), -math.sqrt(3)
    for count in (1, 2):
        assert first_of(advantages_of(rollouts, minibatches=count, **BATCH)) == pytest.approx([up, down, up, up])


def test_tokens_not_completions_are_counted():
    """With a loss per token, centring by completions leaves a push in favour of one length.

    Reward 1 with three tokens, 0 with one: mean 3/4, deviation sqrt(3)/4."""
    rows = whiten([[1.0] * 3, [0.0]])
    assert rows[0] == pytest.approx([1 / math.sqrt(3)] * 3) and rows[1] == pytest.approx([-math.sqrt(3)])
    assert sum(map(sum, rows)) == pytest.approx(0.0)


def test_equal_rewards_of_a_step_give_exactly_zero():
    assert advantages_of([rollout(0, 0.1 + 0.2), rollout(1, 0.3)], **BATCH) == [[0.0, 0.0], [0.0, 0.0]]


def test_without_a_group_an_unscorable_completion_is_left_out():
    found = advantages_of([rollout(0, 1.0), rollout(0, None), rollout(0, 0.0)], **BATCH)
    assert first_of(found) == [1.0, -1.0]


def test_advantages_are_fp32_without_gradient():
    """bf16 advantages round 1/3 to 3 digits, and centered groups no longer sum to 0."""
    batch = packed([rollout(0, 1.0), rollout(0, 0.0)], 8, [1 / 3, -1 / 3])
    assert batch.advantages is not None
    assert batch.advantages.dtype == torch.float32 and not batch.advantages.requires_grad
    assert float(batch.advantages.sum()) == 0.0


def test_no_end_token_is_invented_for_a_truncated_completion():
    """An end token added by hand has no log-probability; the arrays were then off by one (open-instruct#1051)."""
    long = truncated(rollout(0, 0.0, (9, 8, 7)))
    batch = packed([long, rollout(0, 1.0)], 8)
    places = (batch.branches == 1) & (batch.loss_mask > 0)
    assert batch.targets[places].tolist() == [9, 8, 7]
    assert batch.rollout_logprobs is not None
    assert batch.rollout_logprobs[places].tolist() == list(long.completion.logprobs)


def test_kl_in_the_reward_is_subtracted_before_the_baseline():
    """Taken off after the group's mean it moves all completions alike, and the advantages of a group no longer sum to
    0.

    Rewards 1 and 0 less 0.1 + 0.2 and 0.1 + 0.0: 0.7 and -0.1, mean 0.3, advantages 0.4 and -0.4.
    """
    pair = [rollout(0, 1.0), rollout(0, 0.0)]
    assert first_of(advantages_of(pair, [[0.1, 0.2], [0.1, 0.0]])) == pytest.approx([0.4, -0.4])


def test_kl_in_the_reward_is_subtracted_per_token_without_a_group():
    """Returns to go: 1 - 0.3 and 1 - 0.2 for the tokens of the first answer, -0.1 and 0 for the second."""
    assert token_rewards(1.0, [0.1, 0.2]) == pytest.approx([-0.1, 0.8])
    assert returns_to_go([-0.1, 0.8]) == pytest.approx([0.7, 0.8])
    found = advantages_of([rollout(0, 1.0), rollout(0, 0.0)], [[0.1, 0.2], [0.1, 0.0]], **BATCH)
    expected = whiten([[0.7, 0.8], [-0.1, 0.0]])
    assert found[0] == pytest.approx(expected[0]) and found[1] == pytest.approx(expected[1])


@pytest.mark.parametrize(("length", "taken"), [(16, 0.0), (18, 0.5), (20, 1.0)])
def test_the_overlong_penalty_counts_tokens_per_completion(length, taken):
    """A peer measured characters, over the whole batch: what a completion earned depended on its neighbors.

    max_tokens 20, the last fifth: 16 tokens are free, 20 cost all."""
    assert overlong_punishment(length, 20, 0.2) == pytest.approx(taken)
    ids = tuple(range(2, 2 + length))
    alone = advantages_of([rollout(0, 1.0), rollout(0, 1.0, ids)], max_tokens=20, overlong_penalty=0.5)
    assert first_of(alone) == pytest.approx([taken / 4, -taken / 4])
    crowd = [rollout(0, 1.0), rollout(0, 1.0, ids), rollout(1, 1.0, ids), rollout(1, 0.0)]
    found = advantages_of(crowd, max_tokens=20, overlong_penalty=0.5)
    assert first_of(found)[:2] == pytest.approx(first_of(alone))


def test_gather_tokens_inverts_scatter_tokens():
    """Packing sorts completions by length; a number handed to another answer's token would never be noticed."""
    rollouts = [rollout(0, 1.0, (5, 1)), rollout(0, 0.0, (6, 7, 8, 1)), rollout(1, 1.0, (9,))]
    values = [[0.1, 0.2], [1.0, 2.0, 3.0, 4.0], [9.0]]
    batch = packed(rollouts, 6)
    assert batch.rollout_logprobs is not None
    assert [pytest.approx(row) for row in values] == gather_tokens(scatter_tokens(values, batch), batch)
    assert gather_tokens(batch.rollout_logprobs, batch)[1] == [-0.5, -1.5, -2.5, -3.5]
    assert gather_tokens(batch.targets.float(), batch) == [[5, 1], [6, 7, 8, 1], [9]]


def test_reductions_differ_where_lengths_do():
    """What "token", "sequence" and "fixed" mean for completions of 2 and 4 tokens with at most 10."""
    batch = packed([rollout(0, 1.0), rollout(0, 0.0, (6, 7, 8, 1))], 8)
    shares = {
        kind: [sum(row) for row in gather_tokens(token_weights(batch, kind, 10), batch)]
        for kind in ("token", "sequence", "fixed")
    }
    assert shares["token"] == pytest.approx([2 / 6, 4 / 6])
    assert shares["sequence"] == pytest.approx([1 / 2, 1 / 2])
    assert shares["fixed"] == pytest.approx([2 / 20, 4 / 20])


def test_the_kl_penalty_of_a_run_is_that_of_its_reference(make_bandit):
    """At the first step policy and reference are one: nothing is taken off. Later something is, and it is logged."""
    loss = PolicyLossConfig(kl=0.5, kl_estimator="k1", kl_placement="reward")
    rl = make_bandit(loss=loss, **BATCH)
    assert rl.step()["policy/kl_nats"] == pytest.approx(0.0, abs=1e-6)
    for _ in range(10):
        metrics = rl.step()
    assert metrics["policy/kl_nats"] > 0.01
