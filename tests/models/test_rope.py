"""Frequencies of the rotary embedding by hand, with each extension of the context."""

import math

import pytest
import torch

from thinkstack.models.config import Llama3RopeConfig, RopeConfig, YarnConfig
from thinkstack.models.layers import rope_frequencies, rope_table
from thinkstack.types import ConfigError


def test_linear_scaling_divides_every_frequency():
    plain = rope_frequencies(8, RopeConfig(theta=100.0))
    assert torch.allclose(plain, torch.tensor([1.0, 100**-0.25, 100**-0.5, 100**-0.75]))
    assert torch.equal(rope_frequencies(8, RopeConfig(theta=100.0, linear_factor=4.0)), plain / 4)


def test_llama3_keeps_fast_pairs_divides_slow_ones_and_blends_between():
    """Within 8,192 tokens the pairs make 1,303.8, 1.3038 and 0.0013 rotations; below 1 is slow, above 4 is fast."""
    scaling = Llama3RopeConfig(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
    found = rope_frequencies(6, RopeConfig(theta=1e9, llama3=scaling))
    unscaled = (8192 * 1e-3 / (2 * math.pi) - 1) / 3
    assert found.tolist() == pytest.approx([1.0, 1e-3 * (unscaled + (1 - unscaled) / 8), 1e-6 / 8], rel=1e-6)


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    """Width 4, base 1e4: the pairs make 6,518.9 and 65.2 rotations in 40,960 tokens; interpolation ends at index 2."""
    yarn = YarnConfig(factor=4.0, original_max_positions=40960, beta_fast=65536.0, beta_slow=1.0)
    found = rope_frequencies(4, RopeConfig(yarn=yarn))
    assert found.tolist() == pytest.approx([1.0, 0.01 * 0.5 + 0.01 / 4 * 0.5], rel=1e-6)


def test_only_yarn_changes_the_amplitude():
    positions = torch.tensor([[0, 5]])
    for rope in (RopeConfig(), RopeConfig(llama3=Llama3RopeConfig()), RopeConfig(linear_factor=4.0)):
        assert torch.allclose(rope_table(positions, 8, rope).abs(), torch.ones(1, 2, 4))
    qwen = RopeConfig(yarn=YarnConfig(factor=4.0, mscale_all_dim=0.0))
    assert torch.allclose(rope_table(positions, 8, qwen).abs(), torch.full((1, 2, 4), 0.1 * math.log(4) + 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(theta=1.0), "rope.theta=1.0"),
        (dict(linear_factor=0.5), "rope.linear_factor=0.5"),
        (dict(yarn=YarnConfig(), llama3=Llama3RopeConfig()), "rope.yarn and rope.llama3"),
    ],
)
def test_impossible_settings_are_refused_by_name(change: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        RopeConfig(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(("low", "high"), [(4.0, 4.0), (0.0, 4.0)])
def test_llama3_bounds_must_be_in_order(low: float, high: float):
    with pytest.raises(ConfigError, match=r"llama3\.low_freq_factor"):
        Llama3RopeConfig(low_freq_factor=low, high_freq_factor=high)
