"""Matrices in the layout that oneDNN multiplies in, for inference in bf16 on a CPU.

F.linear brings the matrix into that layout on every call. For a few hundred rows or fewer that takes as long as the
product, or longer.
"""

from typing import Any

import torch
from torch import Tensor

MOST_ROWS = 512
"""Beyond it the product outweighs the layout."""
USUAL_ROWS = 64
"""What the layout is made for; it serves any number of rows."""


def blocked(weight: Tensor) -> Tensor:
    """A matrix (N, K) in bf16 in that layout, for `multiply` alone; as much memory once more."""
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), USUAL_ROWS)
    return found


def multiply(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x (..., K) in bf16 with a matrix that is blocked; bias (N,) in bf16."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
    return found


class Blocked:
    """One matrix in that layout: made when a product first asks, made again after the matrix has changed."""

    def __init__(self) -> None:
        self._of: tuple[int, int] | None = None
        self._matrix: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Blocked":
        return Blocked()

    def takes(self, x: Tensor) -> bool:
        """Whether to multiply rows x (..., K) by it: few of them, in bf16, without gradients."""
        return x.dtype == torch.bfloat16 and not torch.is_grad_enabled() and 0 < x.numel() <= MOST_ROWS * x.shape[-1]

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear(x, weight, bias), all in bf16; weight (N, K) is the matrix as it is now."""
        now = (weight.data_ptr(), weight._version)
        if self._matrix is None or self._of != now:
            self._of, self._matrix = now, blocked(weight)
        return multiply(x, self._matrix, bias)


def can_block(weight: Tensor) -> bool:
    """Whether this machine multiplies matrices like `weight` in that layout."""
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
