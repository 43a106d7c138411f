"""Matmuls of oneDNN with prepacked matrices: the only calls of torch's private operators for them.

torch has no public operator for such matmuls, so another version of torch may lack these or change them. `supports`
tries them once; where they fail, F.linear computes instead.
"""

# Shapes in this file: B rows, K inputs, N outputs.

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

REORDER_ROWS = 64
"""Number of rows that the layout is optimized for; the layout works for any number of rows."""


@functools.cache
def supports(dtype: torch.dtype) -> bool:
    """Whether this machine and this version of torch multiply with prepacked matrices of the dtype."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    ones = torch.ones(2, 32, dtype=dtype)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        return torch.equal(_linear(ones, _reorder(ones), None), F.linear(ones, ones))
    except (AttributeError, RuntimeError) as error:
        log.warning("torch %s cannot multiply prepacked matrices: using F.linear (%s)", torch.__version__, error)
        return False


def prepack(weight: Tensor) -> Tensor:
    """A copy of a matrix (N, K) in oneDNN's layout, for `linear`; the matrix itself if oneDNN refuses it."""
    try:
        return _reorder(weight.detach())
    except (AttributeError, RuntimeError):
        return weight.detach()


def linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x (B, K) with a matrix of `prepack` and bias (N,), all of one dtype."""
    return _linear(x, matrix, bias) if matrix.is_mkldnn else F.linear(x, matrix, bias)


def _reorder(weight: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, REORDER_ROWS)
    return found


def _linear(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
    return found
