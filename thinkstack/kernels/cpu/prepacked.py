"""Prepacked matrices, in the blocked layout of oneDNN, for inference on a CPU.

In bf16, F.linear reorders the matrix into this layout on every call; for up to a few hundred rows the reorder takes at
least as long as the matmul. In fp32, F.linear uses MKL, which is half as fast on processors of other vendors than
Intel."""

import functools
import os
from typing import Any

import torch
from torch import Tensor

from thinkstack.kernels.cpu import mkldnn

MAX_MEMORY_SHARE = 1 / 8
"""Maximum share of the memory for prepacked copies of the matrices of a model."""
TESTED_ROWS = (1, 2, 3, 5, 8, 13, 16, 21, 34, 64, 65, 144, 300)
"""Numbers of rows that `is_batch_invariant` tests."""
MAX_TESTED_OUTPUTS = 2048
"""Maximum number of outputs of the matrix in the test of `is_batch_invariant`."""


def prepacked_linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x (B, K) with a prepacked matrix and bias (N,), all of one dtype. A single row in fp32 is duplicated,
    because the order of summation of a matmul with one row may differ."""
    if x.dtype == torch.float32 and len(x) == 1:
        return prepacked_linear(x.repeat(2, 1), matrix, bias)[:1]
    return mkldnn.linear(x, matrix, bias)


@functools.cache
def is_batch_invariant(outputs: int, inputs: int) -> bool:
    """Whether fp32 matmuls with a prepacked matrix (outputs, inputs) are batch-invariant: the result of a row is bit
    for bit independent of the number of rows. oneDNN does not guarantee this, so it is tested."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(TESTED_ROWS[-1], inputs, generator=generator)
    matrix = mkldnn.prepack(
        torch.randn(min(outputs, MAX_TESTED_OUTPUTS + outputs % mkldnn.REORDER_ROWS), inputs, generator=generator)
    )
    together = prepacked_linear(rows, matrix)
    return all(torch.equal(prepacked_linear(rows[-count:], matrix), together[-count:]) for count in TESTED_ROWS)


class PrepackedMatrix:
    """A lazily prepacked copy of a matrix; the copy is updated after the matrix has changed."""

    def __init__(self) -> None:
        self._of: tuple[int, int] | None = None
        self._matrix: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "PrepackedMatrix":
        return PrepackedMatrix()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear(x, weight, bias), all in bf16; weight (N, K) is the current matrix."""
        now = (weight.data_ptr(), weight._version)
        if self._matrix is None or self._of != now:
            self._of, self._matrix = now, mkldnn.prepack(weight)
        return prepacked_linear(x, self._matrix, bias)


def can_prepack(weight: Tensor) -> bool:
    """Whether this machine supports prepacked matrices of the dtype and device of `weight`."""
    return weight.device.type == "cpu" and mkldnn.supports(weight.dtype)


def can_prepack_all(*weights: Tensor) -> bool:
    """Whether prepacked copies of these matrices are supported and need at most MAX_MEMORY_SHARE of the memory."""
    size = sum(weight.nbytes for weight in weights)
    return size <= MAX_MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") and all(
        map(can_prepack, weights)
    )


def prepack_batch_invariant(weight: Tensor) -> Tensor | None:
    """A prepacked copy of an fp32 matrix if its matmuls are batch-invariant, otherwise None."""
    takes = weight.dtype == torch.float32 and can_prepack_all(weight) and is_batch_invariant(*weight.shape)
    return mkldnn.prepack(weight) if takes else None
