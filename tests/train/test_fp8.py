"""Products in 8 bits: scales by hand, errors within what e4m3 allows, and the three products of a layer."""

from dataclasses import replace

import pytest
import torch

from tests.tiny import GQA_TINY, MLA_TINY, random_batch, tiny_model
from thinkstack.kernels.ops import dequantize_
from thinkstack.kernels.reference import padded_experts
from thinkstack.models.moe import MoE
from thinkstack.models.precision import cast_copy
from thinkstack.quant.fp8 import BLOCK, LARGEST, FP8Blocks, dequantize, quantize
from thinkstack.train.fp8 import FP8Experts, FP8Linear, linear, use_fp8

HALF_STEP = 2.0**-4
"""Largest relative rounding error of a normal e4m3 number: half a unit in the last of three bits."""
SUBNORMAL = 2.0**-10
"""Largest absolute rounding error below the normal numbers."""
SCALES = pytest.mark.parametrize("power_of_two", [False, True], ids=["fp32", "ue8m0"])


def random_tensor(*shape: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Numbers whose blocks differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    return x * torch.exp(spread * torch.randn(*shape[:-1], 1, generator=generator))


def test_a_block_is_scaled_so_that_its_peak_is_the_largest_number():
    """By hand: a peak of 896 gives the scale 2; its neighbor block, with 3.5, gives 2**-7."""
    x = torch.zeros(1, 2 * BLOCK)
    x[0, 3], x[0, 4], x[0, BLOCK] = 896.0, -2.0, 3.5
    q, scale = quantize(x, 1)
    assert scale.tolist() == [[2.0, 2.0**-7]]
    assert q[0, 3] == LARGEST and q[0, 4] == -1.0 and q[0, BLOCK] == LARGEST
    assert torch.equal(dequantize(q, scale, 1), x)


def test_scales_of_two_are_rounded_up_so_that_nothing_overflows():
    x = torch.zeros(1, BLOCK)
    x[0, 0] = 449.0
    _, scale = quantize(x, 1, power_of_two=True)
    assert scale.item() == 2.0
    x[0, 0] = 448.0
    assert quantize(x, 1, power_of_two=True)[1].item() == 1.0


@SCALES
@pytest.mark.parametrize(("rows", "shape"), [(1, (5, 300)), (BLOCK, (200, 130)), (BLOCK, (2, 130, 257))])
def test_rounding_is_within_half_a_step_of_e4m3_ragged_edges_included(rows, shape, power_of_two):
    x = random_tensor(*shape, spread=2.0)
    q, scale = quantize(x, rows, power_of_two)
    assert q.dtype == torch.float8_e4m3fn and q.shape == x.shape
    assert scale.shape == (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // BLOCK))
    wide = dequantize(torch.ones_like(q), scale, rows)
    error = (dequantize(q, scale, rows).double() - x.double()).abs()
    assert (error <= torch.maximum(HALF_STEP * x.double().abs() * (1 + 1e-6), SUBNORMAL * wide.double())).all()


def test_zeros_and_tiny_gradients_survive():
    """DeepSeek's inference code takes 1e-4 for the smallest peak; gradients of 1e-9 would all become 0 by it."""
    x = torch.zeros(2, BLOCK)
    x[1] = 1e-9
    q, scale = quantize(x, 1)
    back = dequantize(q, scale, 1)
    assert not back[0].any() and torch.allclose(back[1], x[1], rtol=HALF_STEP)


@SCALES
@pytest.mark.parametrize("stacked", [False, True])
def test_the_three_products_are_within_the_bound_of_e4m3_against_fp64(stacked, power_of_two):
    """Each operand is off by at most half a step, and once more where activations are rounded the other way round."""
    lead = (3,) if stacked else ()
    x, w, grad = (
        random_tensor(*lead, 150, 260),
        random_tensor(*lead, 140, 260, seed=1),
        random_tensor(*lead, 150, 140, seed=2),
    )
    x.requires_grad_(), w.requires_grad_()
    out = linear(x, w, power_of_two)
    found = out, *torch.autograd.grad(out, (x, w), grad)
    a, b, g = (value.detach().double() for value in (x, w, grad))
    pairs = (a, b.mT), (g, b), (g.mT, a)
    for result, (left, right), roundings in zip(found, pairs, (2, 2, 3), strict=True):
        bound = ((1 + HALF_STEP) ** roundings - 1) * (left.abs() @ right.abs())
        slack = 1e-3 * bound.mean()  # subnormals
        error = (result.double() - left @ right).abs()
        assert (error <= bound + slack).all()
        assert error.mean() > 1e-3 * (left @ right).abs().mean(), "it was computed in 8 bits"
        assert error.mean() < 0.08 * (left @ right).abs().mean(), "errors average out"


def test_blocks_keep_an_outlier_from_drowning_the_rest():
    """One scale for the whole tensor would round everything beside an outlier of 1e6 away."""
    x, w = random_tensor(4, 2 * BLOCK, spread=0.0), random_tensor(8, 2 * BLOCK, seed=1, spread=0.0)
    x[0, 0] = 1e6
    w[:, 0] = 0.0
    expected = x[1:].double() @ w.double().T
    assert (linear(x, w, False)[1:].double() - expected).abs().max() < 0.15 * expected.abs().max()


def test_what_is_saved_for_the_backward_pass_is_a_byte_a_number():
    sizes: list[int] = []
    x, w = torch.randn(256, 512, dtype=torch.bfloat16), torch.randn(256, 512, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
        linear(x, w, False)
    assert sum(sizes) < 1.1 * (x.numel() + w.numel())


@SCALES
def test_experts_are_those_of_the_reference_up_to_8_bits(power_of_two):
    generator = torch.Generator().manual_seed(3)
    x, w_in, w_out = (
        random_tensor(60, 32, spread=0.0),
        random_tensor(4, 48, 32, seed=1, spread=0.0),
        random_tensor(4, 32, 24, seed=2, spread=0.0),
    )
    weights, experts = torch.rand(60, 2, generator=generator), torch.randint(4, (60, 2), generator=generator)
    given = [value.requires_grad_() for value in (x, weights, w_in, w_out)]
    grad = random_tensor(60, 32, seed=4, spread=0.0)
    expected = padded_experts(x, weights, experts, w_in, w_out)
    found = FP8Experts(power_of_two)(x, weights, experts, w_in, w_out)
    wanted = expected, *torch.autograd.grad(expected, given, grad)
    for ours, theirs in zip((found, *torch.autograd.grad(found, given, grad)), wanted, strict=True):
        relative = (ours - theirs).norm() / theirs.norm()
        assert 1e-3 < relative < 0.15, "five roundings in a row, each of 2 to 3 %"


def test_rows_that_an_expert_does_not_use_cannot_drown_those_it_does():
    """Empty rows name token 0; were its numbers left in them, a large one would set the scale of every expert."""
    x, w_in, w_out = (random_tensor(*s, seed=i, spread=0.0) for i, s in enumerate(((40, 32), (2, 48, 32), (2, 32, 24))))
    x[0] = 1e6
    experts = torch.cat((torch.zeros(30, 1), torch.ones(10, 1))).long()  # token 0 goes to expert 0
    weights, grad = torch.ones(40, 1), random_tensor(40, 32, seed=4, spread=0.0)
    w_in.requires_grad_()
    outs = [run(x, weights, experts, w_in, w_out) for run in (FP8Experts(False), padded_experts)]
    ours, theirs = (torch.autograd.grad(out, w_in, grad)[0][1] for out in outs)
    assert (ours - theirs).norm() / theirs.norm() < 0.15


@pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["mla", "gqa"])
def test_blocks_multiply_in_8_bits_and_nothing_else_does(cfg):
    model = tiny_model(cfg)
    twin = cast_copy(model, torch.bfloat16)
    use_fp8(twin, power_of_two=False)
    for name, module in twin.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert isinstance(module, FP8Linear) == (".attention." in name or ".ffn." in name), name
        if isinstance(module, MoE):
            assert isinstance(module.expert_module, FP8Experts)
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
    batch = random_batch([9, 5, 12], 16)
    with torch.no_grad():
        plain, found = (m(batch.ids, batch.positions, batch.document_ids).float() for m in (model, twin))
    real = batch.document_ids > 0
    relative = float((found - plain)[real].norm() / plain[real].norm())
    assert 1e-3 < relative < 0.5, "8 bits in every block, and a few tokens sent to other experts"


def test_biases_are_added_after_the_product():
    model = cast_copy(
        tiny_model(replace(GQA_TINY, attention=replace(GQA_TINY.attention, qkv_bias=True))), torch.bfloat16
    )
    base = model.layers[0].attention.wq
    x = torch.randn(3, 32).bfloat16()
    with_bias = FP8Linear(base, False)(x)
    with torch.no_grad():
        base.bias.zero_()
    assert (with_bias - FP8Linear(base, False)(x)).abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(256,), (2, 3, 130, 200), (5, 7), (128, 128)])
def test_all_numbers_of_e4m3_are_dequantized_exactly(shape: tuple[int, ...], dtype: torch.dtype):
    """Against torch's own conversion: subnormal numbers, both zeros and NaN among them."""
    shape = (*shape[:-1], 1, shape[-1]) if len(shape) == 1 else shape
    count = torch.Size(shape).numel()
    qweight = torch.arange(count).remainder(256).to(torch.uint8).view(torch.float8_e4m3fn).view(shape)
    blocks = (*shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK))
    scale = torch.rand(blocks, generator=torch.Generator().manual_seed(0)) + 0.1
    out = torch.empty(shape, dtype=dtype)
    dequantize_(FP8Blocks(), {"qweight": qweight, "scale": scale}, out)
    torch.testing.assert_close(out, dequantize(qweight, scale, BLOCK).to(dtype), rtol=0, atol=0, equal_nan=True)
    assert bool(out.isnan().any()) == (count >= 128)
