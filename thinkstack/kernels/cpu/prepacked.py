"""Matrices in the layout that oneDNN multiplies in, for inference on a CPU.

In bf16 F.linear brings the matrix into that layout on every call. For a few hundred rows or fewer that takes as long as
the product, or longer. In fp32 F.linear is MKL's, which on processors of other makers than its own is half as fast.
"""

import functools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thinkstack import kernels
from thinkstack.kernels import choice

SHARE = 1 / 8
"""Of the memory, for matrices that are kept a second time."""
MOST_ROWS = 512
"""Beyond it the product outweighs the layout."""
USUAL_ROWS = 64
"""What the layout is made for; it serves any number of rows."""
ROWS_TRIED = (1, 2, 3, 5, 8, 13, 16, 21, 34, 64, 65, 144, 300)
"""Numbers of rows that are multiplied to see whether their company matters."""
OUTPUTS_TRIED = 2048
"""Outputs of the matrix that they are multiplied with, at most."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, by the kernel where that is faster."""
    if weight.dtype == x.dtype and kernels.takes_linear(x, *weight.shape):
        return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else kernels.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def upcast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear`, computed in `product_dtype`."""
    dtype = product_dtype(x)
    if dtype == x.dtype:
        return linear(x, weight, bias)
    return linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def linear_grad_x(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of x (N, K), given that (N, M) of its product with weight (M, K)."""
    return kernels.linear_grad_x(grad, weight) if kernels.takes_linear(grad, *weight.shape) else grad @ weight


def linear_grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of a weight (M, K), given that (N, M) of its product with x (N, K)."""
    takes = kernels.takes_linear(grad, grad.shape[1], x.shape[1])
    return kernels.linear_grad_weight(grad, x) if takes else grad.T @ x


class _Linear(torch.autograd.Function):
    """x (..., K) times weight (M, K) transposed, plus bias (M,) or None, by the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return kernels.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            kernels.linear_grad_x(grad, weight) if wants_x else None,
            kernels.linear_grad_weight(grad, x) if wants_weight else None,
            grad.flatten(0, -2).sum(0) if wants_bias else None,
        )


def product_dtype(x: Tensor) -> torch.dtype:
    """What products of x without gradients are computed in: fp32 for bf16 on a processor that only emulates these,
    where torch's own way takes up to 40 times as long; otherwise the dtype of x."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or torch.is_grad_enabled():
        return x.dtype
    return torch.float32 if choice.emulates_bf16() else x.dtype


def prepacked(weight: Tensor) -> Tensor:
    """A matrix (N, K) in that layout, for `multiply` alone; as much memory once more."""
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), USUAL_ROWS)
    return found


def multiply(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x (B, K) with a matrix that is blocked; bias (N,); all of one dtype. A single row in fp32 is made
    two, because alone its products may be summed in another order."""
    if x.dtype == torch.float32 and len(x) == 1:
        return multiply(x.repeat(2, 1), matrix, bias)[:1]
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
    return found


@functools.cache
def is_batch_invariant(outputs: int, inputs: int) -> bool:
    """Whether a row of a product in fp32 with a matrix (outputs, inputs) is the same, bit for bit, in any company.
    Nobody promises it, so it is tried."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS_TRIED[-1], inputs, generator=generator)
    matrix = prepacked(torch.randn(min(outputs, OUTPUTS_TRIED + outputs % USUAL_ROWS), inputs, generator=generator))
    together = multiply(rows, matrix)
    return all(torch.equal(multiply(rows[-count:], matrix), together[-count:]) for count in ROWS_TRIED)


class PrepackedMatrix:
    """One matrix in that layout: made when a product first asks, made again after the matrix has changed."""

    def __init__(self) -> None:
        self._of: tuple[int, int] | None = None
        self._matrix: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "PrepackedMatrix":
        return PrepackedMatrix()

    def takes(self, x: Tensor) -> bool:
        """Whether to multiply rows x (..., K) by it: few of them, in bf16, without gradients."""
        return x.dtype == torch.bfloat16 and not torch.is_grad_enabled() and 0 < x.numel() <= MOST_ROWS * x.shape[-1]

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear(x, weight, bias), all in bf16; weight (N, K) is the matrix as it is now."""
        now = (weight.data_ptr(), weight._version)
        if self._matrix is None or self._of != now:
            self._of, self._matrix = now, prepacked(weight)
        return multiply(x, self._matrix, bias)


def can_prepack(weight: Tensor) -> bool:
    """Whether this machine multiplies matrices like `weight` in that layout."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.float32:
        return True
    return weight.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fits_prepacked(*weights: Tensor) -> bool:
    """Whether matrices may be kept a second time: blocked, in no more than SHARE of the memory."""
    size = sum(weight.nbytes for weight in weights)
    return size <= SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") and all(map(can_prepack, weights))


def exact(weight: Tensor) -> Tensor | None:
    """A matrix in fp32, blocked, where products with it do not depend on a row's company."""
    takes = weight.dtype == torch.float32 and fits_prepacked(weight) and is_batch_invariant(*weight.shape)
    return prepacked(weight) if takes else None
