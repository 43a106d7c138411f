"""Norm, rotary embedding and feed-forward against autograd of their formulas, and YaRN against hand numbers."""

import math

import pytest
import torch
import torch.nn.functional as F

from thinkstack.kernels.ops import rotate, swiglu
from thinkstack.models.config import RopeConfig, YarnConfig, named, yarn_mscale
from thinkstack.models.layers import RMSNorm, SwiGLU, rope_frequencies, rope_table, yarn_range


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(output, inputs, random_tensor(*output.shape, seed=9))


def test_rms_norm_of_a_worked_row():
    norm = RMSNorm(2, eps=0.0)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0]))
    rms = math.sqrt((9 + 16) / 2)
    torch.testing.assert_close(norm(torch.tensor([[3.0, 4.0]])), torch.tensor([[3 / rms, 8 / rms]]))


def test_rms_norm_backward_is_autograds():
    x, norm = random_tensor(3, 5, 8).requires_grad_(), RMSNorm(8, eps=1e-6)
    weight = (1 + random_tensor(8, seed=1) / 4).requires_grad_()
    norm.weight = torch.nn.Parameter(weight.detach().clone())
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight
    for mine, theirs in zip(gradients(norm(x), x, norm.weight), gradients(plain, x, weight), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_rms_norm_computes_in_fp32_and_keeps_the_dtype():
    x = torch.full((1, 512), 300.0, dtype=torch.bfloat16)
    x[0, 0] = 1.0
    out = RMSNorm(512, eps=1e-6)(x)
    exact = x.double() / x.double().square().mean().sqrt()
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.to(torch.bfloat16))


def test_swiglu_backward_is_autograds():
    gate, up = random_tensor(4, 6).requires_grad_(), random_tensor(4, 6, seed=1).requires_grad_()
    pairs = zip(gradients(swiglu(gate, up), gate, up), gradients(F.silu(gate) * up, gate, up), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_feed_forward_is_the_papers_formula():
    layer, x = SwiGLU(6, 10), random_tensor(3, 6)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data = random_tensor(*parameter.shape, seed=seed + 1)
    expected = (F.silu(x @ layer.w1.weight.T) * (x @ layer.w3.weight.T)) @ layer.w2.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_interleaved_rotation_rotates_neighboring_pairs():
    """At position 1 the pair (x0, x1) is rotated by 1 radian, and (x2, x3) by theta ** -0.5 = 0.01."""
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    out = rotate(x, rope_table(torch.tensor([[1]]), 4, RopeConfig()), interleaved=True).flatten()
    expected = [math.cos(1), math.sin(1), -math.sin(0.01), math.cos(0.01)]
    torch.testing.assert_close(out, torch.tensor(expected))


def test_heads_at_odd_offsets_are_rotated(on_torch):
    """torch views numbers as complex at even offsets only."""
    x, table = random_tensor(1, 1, 1, 9), rope_table(torch.tensor([[3]]), 4, RopeConfig())
    assert torch.equal(on_torch(rotate, x[..., 5:], table, True), on_torch(rotate, x[..., 5:].clone(), table, True))


def test_half_split_rotation_rotates_distant_pairs():
    """The Llama layout pairs x0 with x2 and x1 with x3."""
    x = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)
    out = rotate(x, rope_table(torch.tensor([[1]]), 4, RopeConfig()), interleaved=False).flatten()
    expected = [math.cos(1), -math.sin(0.01), math.sin(1), math.cos(0.01)]
    torch.testing.assert_close(out, torch.tensor(expected))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotate_backward_is_the_inverse_rotation(interleaved):
    x = random_tensor(2, 3, 2, 8).requires_grad_()
    table = rope_table(torch.arange(6).view(2, 3), 8, RopeConfig(theta=100.0))
    cos, sin = table.real.unsqueeze(2), table.imag.unsqueeze(2)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        plain = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    else:
        a, b = x[..., :4], x[..., 4:]
        plain = torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
    mine = rotate(x, table, interleaved)
    torch.testing.assert_close(mine, plain)
    torch.testing.assert_close(gradients(mine, x), gradients(plain, x))


@pytest.mark.parametrize("interleaved", [True, False])
def test_a_rotated_product_depends_on_the_distance_alone(interleaved):
    q, k = random_tensor(1, 1, 1, 8), random_tensor(1, 1, 1, 8, seed=1)

    def product(at: int, other: int) -> float:
        block_tables = [rope_table(torch.tensor([[p]]), 8, RopeConfig(theta=50.0)) for p in (at, other)]
        return float((rotate(q, block_tables[0], interleaved) * rotate(k, block_tables[1], interleaved)).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-5)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-3)


def test_rope_tables_are_fp32_whatever_the_model_computes_in():
    """In bf16 the angle of position 300 would be off by more than a radian."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        table = rope_table(torch.tensor([[301]]), 2, RopeConfig())
    assert table.dtype == torch.complex64
    assert float(table.real) == pytest.approx(math.cos(301), abs=1e-4)


def test_yarn_blends_between_pairs_10_and_23_for_v3():
    """64 wide, theta 10,000, 4,096 positions: 64 ln(4096 / 64 pi) / 2 ln 10000 = 10.47, with beta 1 it is 22.51."""
    assert yarn_range(64, 10000.0, YarnConfig()) == (10, 23)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    plain = rope_frequencies(64, RopeConfig())
    yarn = rope_frequencies(64, RopeConfig(yarn=YarnConfig()))
    torch.testing.assert_close(yarn[:11], plain[:11])
    torch.testing.assert_close(yarn[23:], plain[23:] / 40)
    share = (16 - 10) / 13
    assert float(yarn[16]) == pytest.approx(float(plain[16]) * (1 - share + share / 40), rel=1e-5)


def test_yarn_amplitude_is_one_for_v3_and_not_for_unequal_mscales():
    at = torch.tensor([[5]])
    even = rope_table(at, 8, RopeConfig(yarn=YarnConfig()))
    uneven = rope_table(at, 8, RopeConfig(yarn=YarnConfig(mscale=1.0, mscale_all_dim=0.0)))
    torch.testing.assert_close(even.abs(), torch.ones(1, 1, 4))
    torch.testing.assert_close(uneven.abs(), torch.full((1, 1, 4), 0.1 * math.log(40) + 1))


def test_yarn_mscale_of_a_factor_of_40():
    assert yarn_mscale(40.0, 1.0) == pytest.approx(1.3688879)
    assert yarn_mscale(1.0, 1.0) == 1.0


def test_the_softmax_scale_of_v3_carries_mscale_squared():
    assert named("v3-671b").softmax_scale == pytest.approx(192**-0.5 * 1.3688879**2)
    assert named("v3-tiny").softmax_scale == pytest.approx(0.125)
