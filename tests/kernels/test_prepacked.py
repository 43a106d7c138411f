"""Prepacked matrices against F.linear."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.test_kernels import random_tensor
from thinkstack.kernels import ops
from thinkstack.kernels.cpu import mkldnn, prepacked
from thinkstack.kernels.cpu.prepacked import (
    PrepackedMatrix,
    can_prepack,
    is_batch_invariant,
    prepacked_linear,
)
from thinkstack.kernels.sizes import MAX_PREPACKED_ROWS
from thinkstack.models.layers import Linear, prepack_weights

pytestmark = pytest.mark.skipif(
    not can_prepack(torch.empty(1, dtype=torch.bfloat16)), reason="no bf16 products of oneDNN on this machine"
)


def layer(bias: bool = False) -> Linear:
    made = Linear(96, 40, bias=bias)
    made.weight.data = random_tensor(40, 96, dtype=torch.bfloat16)
    if bias:
        made.bias.data = random_tensor(40)
    prepack_weights(made)
    return made


def close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return mine.shape == theirs.shape and torch.allclose(mine.float(), theirs.float(), rtol=1e-2, atol=5e-2)


@pytest.mark.parametrize("rows", [(1,), (9,), (64, 1), (2, 33), (MAX_PREPACKED_ROWS + 1,)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_product_is_that_of_the_plain_layout(monkeypatch, rows, bias):
    monkeypatch.setitem(ops.TABLE, "linear", ops.TABLE["linear"][1:])  # without the small-M kernel
    made, x = layer(bias), random_tensor(*rows, 96, seed=1, dtype=torch.bfloat16)
    expected = F.linear(x, made.weight, made.bias.bfloat16() if bias else None)
    assert close(made(x), expected)
    assert (made.prepacked._matrix is not None) == (x.numel() // 96 <= MAX_PREPACKED_ROWS)
    every_other = random_tensor(rows[0], 192, seed=2, dtype=torch.bfloat16)[:, ::2]
    assert close(made(every_other), F.linear(every_other, made.weight, made.bias.bfloat16() if bias else None))


@torch.no_grad()
def test_a_changed_matrix_is_prepacked_again():
    made, x = layer(), random_tensor(16, 96, seed=1, dtype=torch.bfloat16)
    before = made(x)
    made.weight.mul_(2)
    assert close(made(x), 2 * before)
    made.load_state_dict({"weight": -made.weight})
    assert close(made(x), -2 * before)
    made.weight.data = made.weight.data.clone().mul_(0.5)
    assert close(made(x), -before)


@torch.no_grad()
def test_copies_prepack_their_own_matrix():
    made, x = layer(), random_tensor(16, 96, seed=1, dtype=torch.bfloat16)
    before = made(x)
    copied = copy.deepcopy(made)
    assert isinstance(copied.prepacked, PrepackedMatrix) and copied.prepacked is not made.prepacked
    copied.weight.mul_(2)
    assert close(copied(x), 2 * before) and close(made(x), before)
    assert list(made.state_dict()) == ["weight"]


def test_matrices_too_large_for_the_memory_are_not_prepacked(monkeypatch):
    monkeypatch.setattr(prepacked, "MAX_MEMORY_SHARE", 0)
    assert layer().prepacked is None


def test_prepacked_matrices_are_not_used_with_gradients_or_in_fp32():
    made, x = layer(), random_tensor(16, 96, seed=1, dtype=torch.bfloat16)
    made(x).sum().backward()
    assert made.weight.grad is not None and made.prepacked._matrix is None
    plain = Linear(96, 40, bias=False)
    prepack_weights(plain)
    assert plain.prepacked is None


@pytest.fixture
def one_thread_more():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("outputs", "inputs"), [(40, 96), (960, 576), (576, 1536)])
@torch.no_grad()
def test_prepacked_products_in_fp32_are_batch_invariant(outputs, inputs, one_thread_more):
    """A single row of 1,536 numbers was summed in another order than one of two. Every number of rows up to 70."""
    assert is_batch_invariant(outputs, inputs, torch.get_num_threads())
    x, matrix = random_tensor(70, inputs), mkldnn.prepack(random_tensor(outputs, inputs, seed=1))
    together = prepacked_linear(x, matrix)
    assert all(torch.equal(prepacked_linear(x[-n:], matrix), together[-n:]) for n in range(1, 71))
    torch.testing.assert_close(together, F.linear(x, random_tensor(outputs, inputs, seed=1)), rtol=1e-4, atol=1e-3)


@torch.no_grad()
def test_numbers_of_rows_with_another_order_of_summation_are_replaced(monkeypatch):
    """13 numbers of rows were tried, and all others believed. Here the sums of 37, 38 and 90 rows differ."""
    given = mkldnn.linear

    def differing(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return given(x, matrix, bias) * (1.0 + 1e-6 * (len(x) in (37, 38, 90)))

    monkeypatch.setattr(mkldnn, "linear", differing)
    x, matrix = random_tensor(100, 160), mkldnn.prepack(random_tensor(48, 160, seed=1))
    together = prepacked_linear(x, matrix)
    for count, size in {36: 36, 37: 64, 38: 39, 90: 91}.items():
        assert prepacked.rows_at_once(48, 160, count, torch.get_num_threads()) == size
        assert torch.equal(prepacked_linear(x[:count], matrix), together[:count])
    monkeypatch.setattr(prepacked, "equals_reference", lambda *_: False)
    with pytest.raises(RuntimeError, match=r"\(48, 160\) depend on the number of rows \(3\).*THINKSTACK_KERNELS=0"):
        prepacked_linear(x[:3], matrix)


@pytest.fixture(params=["a missing operator", "an operator that refuses"])
def without_onednn(request, monkeypatch):
    def refuse(*_):
        raise RuntimeError("could not create a primitive")

    given = SimpleNamespace(_reorder_linear_weight=refuse, _is_mkldnn_bf16_supported=lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace() if "missing" in request.param else given)
    mkldnn.supports.cache_clear()
    yield
    mkldnn.supports.cache_clear()


@torch.no_grad()
def test_without_private_operators_matmuls_are_torchs(without_onednn, caplog):
    """torch.ops.mkldnn is not public: a version of torch may lack an operator or change its arguments."""
    x, weight, bias = random_tensor(5, 96), random_tensor(40, 96, seed=1), random_tensor(40, seed=2)
    assert not can_prepack(weight) and "cannot multiply prepacked matrices" in caplog.text
    assert prepacked.prepack_batch_invariant(weight) is None
    assert torch.equal(mkldnn.linear(x, mkldnn.prepack(weight), bias), F.linear(x, weight, bias))
    made = layer(bias=True)
    assert made.prepacked is None
    assert torch.equal(made(x.bfloat16()), ops.linear(x.bfloat16(), made.weight, made.bias))
