"""The critic's arithmetic against hand-worked numbers."""

from dataclasses import replace

import pytest
import torch

from tests.tiny import GQA_TINY, random_batch, tiny_model
from thinkstack.models.value_head import ValueModel
from thinkstack.train.loss import token_weights
from thinkstack.train.optim import OptimConfig
from thinkstack.train.trainer import Trainer
from thinkstack.train.trainer_config import TrainerConfig
from thinkstack.train.value_loss import ValueTokens, explained_variance, gae, value_loss
from thinkstack.types import Batch


def valued(values: list[float], returns: list[float], old: list[float] | None = None) -> ValueTokens:
    count = len(values)
    return ValueTokens(
        values=torch.tensor(values, requires_grad=True),
        weights=torch.full((count,), 1 / count),
        share=1 / count,
        returns=torch.tensor(returns),
        old_values=torch.tensor(values if old is None else old),
    )


def slope(tokens: ValueTokens, clip: float) -> list[float]:
    return torch.autograd.grad(value_loss(tokens, clip)[0], tokens.values)[0].tolist()


def test_advantages_of_a_worked_answer():
    """Reward 1 on the last of three tokens, values 0.5, 0.2, 0.6, gamma = lambda = 0.5.

    delta = (0 + 0.1 - 0.5, 0 + 0.3 - 0.2, 1 + 0 - 0.6) = (-0.4, 0.1, 0.4); gamma lambda = 0.25:
    A_3 = 0.4, A_2 = 0.1 + 0.1 = 0.2, A_1 = -0.4 + 0.05 = -0.35.
    """
    assert gae([0, 0, 1], [0.5, 0.2, 0.6], 0.5, 0.5) == pytest.approx([-0.35, 0.2, 0.4])


def test_lambda_1_is_the_return_minus_the_prediction():
    assert gae([0, 0, 1], [0.5, 0.2, 0.6], 1.0, 1.0) == pytest.approx([0.5, 0.8, 0.4])


def test_lambda_0_looks_one_step_ahead():
    assert gae([0, 0, 1], [0.5, 0.2, 0.6], 1.0, 0.0) == pytest.approx([-0.3, 0.4, 0.4])


def test_a_critic_that_knows_nothing_leaves_the_plain_return():
    """With values 0 PPO is REINFORCE without a baseline."""
    assert gae([-0.1, 0.0, 1.0], [0.0] * 3, 1.0, 1.0) == pytest.approx([0.9, 1.0, 1.0])


def test_the_value_loss_is_half_the_squared_error():
    """Errors -0.5 and 1: (0.25 + 1) / 2 / 2 tokens; the gradient is the error over the tokens."""
    tokens = valued([0.5, 1.0], [1.0, 0.0])
    assert value_loss(tokens, 0.0)[0].item() == pytest.approx(0.3125)
    assert slope(tokens, 0.0) == pytest.approx([-0.25, 0.5])


@pytest.mark.parametrize(
    ("value", "loss", "gradient"),
    [(0.1, 0.405, -0.9), (0.5, 0.32, 0.0), (-0.5, 1.125, -1.5), (1.9, 0.405, 0.9)],
    ids=["near the old value", "moved far towards the return", "moved far away from it", "moved far past it"],
)
def test_a_prediction_that_moves_far_towards_its_return_is_held_where_it_moved_to(value, loss, gradient):
    """Old value 0, return 1, clip 0.2. At 0.5 the clipped prediction 0.2 is the worse one, (0.8)^2 / 2 = 0.32, and has
    no gradient. Away from the return, or past it, the plain error is worse and counts: 1.5^2 / 2, 0.9^2 / 2."""
    tokens = valued([value], [1.0], [0.0])
    found, stats = value_loss(tokens, 0.2)
    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert slope(tokens, 0.2) == pytest.approx([gradient], abs=1e-6)
    assert float(stats["critic/clipped"]) == float(gradient == 0.0)


@pytest.mark.parametrize(
    ("values", "explained"), [([0.0, 1.0], 1.0), ([0.5, 0.5], 0.0), ([1.0, 0.0], -3.0), ([5.0, 6.0], 1.0)]
)
def test_explained_variance_of_returns_0_and_1(values, explained):
    """Var(return) = 1/4. Predicting the mean leaves all of it; the opposite leaves 1; an offset is no variance."""
    stats = value_loss(valued(values, [0.0, 1.0]), 0.0)[1]
    assert explained_variance({name: float(value) for name, value in stats.items()}) == pytest.approx(
        explained, abs=1e-5
    )


def test_equal_returns_have_no_variance_to_explain():
    stats = value_loss(valued([0.3, 0.1], [1.0, 1.0]), 0.0)[1]
    assert explained_variance({name: float(value) for name, value in stats.items()}) == 0.0


def value_batch(seed: int = 0) -> Batch:
    """Returns that depend on the token just read: something a critic can learn."""
    batch = random_batch([9, 5, 12, 3], 16, seed=seed)
    returns = (batch.ids % 2).float() * batch.loss_mask
    return replace(batch, weights=token_weights(batch, "token"), returns=returns, values=torch.zeros_like(returns))


PLAIN = TrainerConfig(
    dtype="fp32", micro_batch_tokens=64, balance_weight=0.0, bias_speed=0.0, optim=OptimConfig(learning_rate=1e-2)
)


def loss_of(tokens: ValueTokens):
    return value_loss(tokens, 0.0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_critic_learns_returns_that_can_be_read_off_the_tokens(dtype):
    trainer = Trainer(ValueModel.from_policy(tiny_model()), replace(PLAIN, dtype=dtype), 60)
    found = [trainer.step(value_batch(), loss_of) for _ in range(60)]
    assert explained_variance(found[0]) < 0.1
    assert explained_variance(found[-1]) > 0.9


@pytest.mark.parametrize("changes", [{"micro_batch_tokens": 16}, {"micro_batch_tokens": 16, "workers": 2}])
def test_how_a_critics_step_is_cut_changes_nothing(changes):
    """Returns and old values are cut with the rows they belong to."""
    ends = []
    for settings in ({}, changes):
        trainer = Trainer(ValueModel.from_policy(tiny_model(GQA_TINY)), replace(PLAIN, **settings), 1)
        metrics = trainer.step(value_batch(), loss_of)
        ends.append((trainer.model.embed.weight.detach(), metrics["critic/error_square_mean"]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-4, atol=1e-6)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)
