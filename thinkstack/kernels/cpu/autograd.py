"""Norm, activation, rotation and matmul with the C++ kernels, with gradients; interfaces as in ops.py.

Without gradients the kernel is called directly.
"""

# Shapes in this file: B rows, T tokens, H heads, D width, R rotated width, K inputs, M outputs.

from typing import Any

import torch
from torch import Tensor

from thinkstack.kernels.cpu import rows


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        x = x if rows.is_rows(x) else x.contiguous()
        out, inverse = rows.rms_norm(x, weight.float(), eps, return_inverse=True)
        ctx.save_for_backward(x, inverse, weight)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, inverse, weight = ctx.saved_tensors
        grad_x, grad_weight = rows.rms_norm_backward(grad, x, weight.float(), inverse)
        return grad_x, grad_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Without gradients the rows of x must be contiguous."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return rows.rms_norm(x, weight.float(), eps, return_inverse=False)[0]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return rows.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return rows.swiglu_backward(grad, *ctx.saved_tensors)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up are contiguous."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else rows.swiglu(gate, up)


class _Rotate(torch.autograd.Function):
    """The gradient is rotated by the negative angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, interleaved: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(table)
        ctx.interleaved = interleaved
        return rows.rotate(x, table, interleaved)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        grad = grad if rows.is_rotatable(grad) else grad.contiguous()
        return rows.rotate(grad, ctx.saved_tensors[0], ctx.interleaved, inverse=True), None, None


def rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """x: (B, T, H, R), of which each x[:, :, h] has contiguous rows with one stride."""
    return _Rotate.apply(x, table, interleaved) if torch.is_grad_enabled() else rows.rotate(x, table, interleaved)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        return rows.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            rows.linear_grad_x(grad, weight) if wants_x else None,
            rows.linear_grad_weight(grad, x) if wants_weight else None,
            grad.flatten(0, -2).sum(0) if wants_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K) times weight (M, K) transposed, plus bias (M,) or None, in fp32; M and K are multiples of LANES."""
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else rows.linear(x, weight, bias)
