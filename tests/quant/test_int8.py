"""int8: a worked example, zeros, stacks, products, models."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.test_kernels import random_tensor
from tests.tiny import GQA_TINY, MLA_TINY, tiny_model
from thinkstack.kernels import ops
from thinkstack.kernels.conditions import fits_small_m
from thinkstack.kernels.cpu import calls, inference
from thinkstack.models.layers import QuantizedLinear, QuantizedWeight
from thinkstack.models.precision import inference_copy
from thinkstack.models.quantized import (
    dequantize_model,
    quantizable_matrices,
    quantize_model,
    quantized_weights,
)
from thinkstack.quant.int8 import Int8

needs_kernels = pytest.mark.skipif(not calls.available(), reason="no C++ compiler")


def there_and_back(weight: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(weight)
    ops.dequantize_(Int8(), Int8().quantize(weight), out)
    return out


def test_qweight_and_scale_of_a_worked_example():
    """Of the second row 1.27 is the largest, so steps are 0.01; 0.0149 and -0.0051 are on either side of a half
    step."""
    parts = Int8().quantize(torch.tensor([[254.0, -254.0, 2.0, 1.1], [0.0149, -0.0051, 1.27, -0.004]]))
    assert parts["qweight"].tolist() == [[127, -127, 1, 1], [1, -1, 127, 0]]
    assert parts["qweight"].dtype == torch.int8 and parts["scale"].dtype == torch.float32
    assert parts["scale"].flatten().tolist() == pytest.approx([2.0, 0.01])
    out = torch.empty(2, 4)
    Int8().dequantize_(parts, out)
    assert out[0].tolist() == [254.0, -254.0, 2.0, 2.0]


def test_a_row_of_zeros_comes_back_and_its_neighbors_are_not_touched():
    weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, -0.5, 0.25], [1e-42, 0.0, 0.0]])
    back = there_and_back(weight)
    assert torch.equal(back[0], torch.zeros(3)) and bool(back.isfinite().all())
    assert float((back - weight).abs().max()) <= 0.5 / 127


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_is_off_by_half_a_step_at_most(dtype):
    """Also in stacks, which have a scale per row; in bf16 the result is rounded once more."""
    weight = (torch.randn(3, 2, 5, 70, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 6)[:, None]).to(
        dtype
    )
    parts = Int8().quantize(weight)
    assert parts["qweight"].shape == weight.shape and parts["scale"].shape == (3, 2, 5, 1)
    step = weight.float().abs().amax(-1, keepdim=True) / 127
    exact = torch.empty(weight.shape)
    Int8().dequantize_(parts, exact)
    assert bool(((exact - weight.float()).abs() <= 0.501 * step).all())
    assert torch.equal(there_and_back(weight), exact.to(dtype))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_dequantizes_as_torch_does(dtype, on_torch):
    weight = torch.randn(3, 5, 70, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert torch.equal(there_and_back(weight), on_torch(there_and_back, weight))


def product(x: torch.Tensor, parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The small-M kernel's product, and the exact one."""
    qweight, scale = parts["qweight"], parts["scale"]
    with torch.no_grad():
        assert fits_small_m(x, qweight)
        return inference.small_m_linear(x, qweight, scale), x.double() @ (qweight.double() * scale.double()).T


@needs_kernels
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("width", [32, 96, 576])
def test_small_m_products_read_int8_weights(count, width):
    x = random_tensor(count, width, dtype=torch.bfloat16)
    mine, exact = product(x, Int8().quantize(random_tensor(50, width, seed=1) * torch.arange(1, 51)[:, None]))
    assert float((mine - exact).norm() / exact.norm()) < 3e-3  # half a unit in bf16's last place
    assert not fits_small_m(random_tensor(9, width, dtype=torch.bfloat16), torch.ones(50, width, dtype=torch.int8))


@needs_kernels
def test_one_large_activation_does_not_blur_the_others():
    """Rounding activations to 8 or 16 bits relative to the row's largest would lose the other 127 here."""
    x, weight = random_tensor(1, 128, dtype=torch.bfloat16), random_tensor(50, 128, seed=1)
    x[0, 7], weight[:, 7] = 2_000, 0.0
    mine, exact = product(x, Int8().quantize(weight))
    assert float((mine - exact).norm() / exact.norm()) < 3e-3


@needs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value):
    """The engine ends a completion whose logits are not finite, but integers cannot represent NaN."""
    x = random_tensor(3, 64, dtype=torch.bfloat16)
    x[1, 5] = value
    mine, _ = product(x, Int8().quantize(random_tensor(50, 64, seed=1)))
    assert not bool(mine[1].isfinite().any()) and bool(mine[[0, 2]].isfinite().all())


@needs_kernels
@torch.no_grad()
def test_a_quantized_layer_uses_the_kernel_for_small_m_only(on_torch):
    layer = torch.nn.Linear(64, 40, bias=False)
    quantized = QuantizedLinear(QuantizedWeight(Int8(), layer.weight, torch.bfloat16), None)
    x = random_tensor(9, 64, dtype=torch.bfloat16)
    small_m, gemm = quantized(x[:8]), quantized(x)
    assert torch.equal(small_m, inference.small_m_linear(x[:8], quantized.quantized.qweight, quantized.quantized.scale))
    with torch.no_grad():
        assert torch.equal(gemm, ops.linear(x, quantized.weight))
    torch.testing.assert_close(small_m, on_torch(quantized, x[:8]), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["mla", "gqa"])
@torch.no_grad()
def test_a_quantized_model_computes_what_its_dequantized_weights_do(cfg):
    model = tiny_model(cfg)
    expected = {name: there_and_back(model.get_parameter(name)) for name in quantizable_matrices(model)}
    quantize_model(model, Int8(), quantizable_matrices(model))
    ids = torch.arange(20).view(2, 10)
    quantized = model(ids)
    assert set(quantized_weights(model)) == set(expected)
    plain = dequantize_model(model)
    assert not quantized_weights(plain)
    for name, weight in expected.items():
        assert torch.equal(plain.get_parameter(name), weight), name
    torch.testing.assert_close(quantized, plain(ids))


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_copy_leaves_the_model_unchanged(tied):
    """The head is quantized and the embedding is not, even if they are one parameter."""
    model = tiny_model(GQA_TINY, tie_embeddings=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied = inference_copy(model, torch.bfloat16, "int8")
    after = model.state_dict()
    assert not quantized_weights(model) and list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.float32 for name in before)
    assert set(quantized_weights(copied)) == {*quantizable_matrices(model), "head.weight"}
    assert torch.equal(copied.embed.weight, model.embed.weight.bfloat16())
    assert torch.equal(copied.head.weight, there_and_back(model.head.weight.detach()).bfloat16())
    assert copied.norm.weight.dtype == torch.float32


@pytest.mark.parametrize("tokens", [8, 40])
@pytest.mark.parametrize("cfg", [MLA_TINY, GQA_TINY], ids=["mla", "gqa"])
@torch.no_grad()
def test_products_in_bf16_are_near_those_of_the_dequantized_weights(cfg, tokens):
    """For small M, where int8 weights are read directly, and for more rows, where matrices are dequantized first."""
    model = tiny_model(replace(cfg, moe=None))  # rounding could send a token to other experts
    ids = torch.arange(tokens)[None]
    found = inference_copy(model, torch.bfloat16, "int8")(ids)
    quantize_model(model, Int8(), [*quantizable_matrices(model), "head.weight"])
    exact = dequantize_model(model)(ids)
    assert float((found - exact).norm() / exact.norm()) < 0.04
