"""The moving average against its sum written out."""

from dataclasses import replace

import pytest
import torch

from tests.tiny import GQA_TINY, tiny_model
from thinkstack.train.ema import MovingAverage
from thinkstack.types import ConfigError


def test_the_average_is_the_weighted_sum_of_the_steps_alone():
    """Weights decay ** (n - i) over their sum; the weights before the first update count for nothing."""
    models, decay = [tiny_model(seed=seed) for seed in range(6)], 0.7
    average = MovingAverage(models[0], decay)
    for updates, model in enumerate(models[1:], start=1):
        average.update(model, updates)
    weights = torch.tensor([decay ** (5 - i) for i in range(1, 6)])
    for name in average.values:
        stacked = torch.stack([model.state_dict()[name] for model in models[1:]])
        expected = torch.einsum("n,n...->...", weights / weights.sum(), stacked)
        torch.testing.assert_close(average.values[name], expected, rtol=1e-5, atol=1e-6)


def test_balance_biases_are_averaged_and_a_tied_matrix_is_kept_once():
    assert "layers.1.ffn.bias" in MovingAverage(tiny_model(), 0.5).values
    tied = MovingAverage(tiny_model(replace(GQA_TINY, tie_embeddings=True)), 0.5).values
    assert "embed.weight" in tied and "head.weight" not in tied


def test_a_restored_average_goes_on_to_the_last_bit():
    straight, stopped = (MovingAverage(tiny_model(), 0.9) for _ in range(2))
    for updates in range(1, 5):
        straight.update(tiny_model(seed=updates), updates)
        if updates <= 2:
            stopped.update(tiny_model(seed=updates), updates)
    resumed = MovingAverage(tiny_model(), 0.9)
    resumed.restore({name: value.clone() for name, value in stopped.state().items()} | {"model.x": torch.zeros(1)})
    for updates in (3, 4):
        resumed.update(tiny_model(seed=updates), updates)
    assert all(torch.equal(resumed.values[name], value) for name, value in straight.values.items())


def test_the_average_can_be_written_into_a_model():
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    average = MovingAverage(first, 0.5)
    average.update(first, 1)
    average.write_to(second)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5])
def test_a_decay_that_averages_nothing_or_everything_is_refused(decay):
    with pytest.raises(ConfigError, match="ema_decay"):
        MovingAverage(tiny_model(), decay)
