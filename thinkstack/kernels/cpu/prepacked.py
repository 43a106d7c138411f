"""Prepacked matrices, in the blocked layout of oneDNN, for inference on a CPU.

In bf16, F.linear reorders the matrix into this layout on every call; for up to a few hundred rows the reorder takes at
least as long as the matmul. In fp32, F.linear uses MKL, which is half as fast on processors of other vendors than
Intel.

oneDNN does not promise that the fp32 result of a row is independent of the number of rows and threads: it chooses
blocks and the order of summation by shape, so one row of 1,536 inputs is summed in another order than two. Therefore
`prepacked_linear` multiplies only numbers of rows that were tested: the first time that a number of rows is asked for,
all its rows are compared bit for bit with the reference, which is two rows on one thread (`rows_at_once`). Values do
not affect the order of summation, so a test with one matrix holds for all of its shape.
"""

# Shapes in this file: B rows, K inputs, N outputs.

import functools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thinkstack.kernels.cpu import mkldnn

MAX_MEMORY_SHARE = 1 / 8
"""Maximum share of the memory for prepacked copies of the matrices of a model."""
MAX_TESTED_OUTPUTS = 4096
"""Maximum number of outputs of a matrix in a test. Outputs are independent sums, computed in blocks of up to
REORDER_ROWS; more outputs add more blocks, and the last one keeps its size."""


def prepacked_linear(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x (B, K) with a matrix (N, K) of `mkldnn.prepack` and bias (N,), all of one dtype. Batch-invariant in
    fp32, and independent of the number of threads."""
    count = len(x)
    size = rows_at_once(*matrix.shape, count, torch.get_num_threads()) if x.dtype == torch.float32 else count
    if size == count:
        return mkldnn.linear(x, matrix, bias)
    pieces = F.pad(x, (0, 0, 0, -count % size)).split(size)
    return torch.cat([mkldnn.linear(piece, matrix, bias) for piece in pieces])[:count]


@functools.cache
def rows_at_once(outputs: int, inputs: int, count: int, threads: int) -> int:
    """Number of rows to multiply at once for `count` rows of fp32 and a matrix (outputs, inputs) with torch's current
    number of threads, `threads`: count, or if its results differ from the reference, one more or REORDER_ROWS."""
    for size in (count, count + 1, mkldnn.REORDER_ROWS):
        if equals_reference(outputs, inputs, size):
            return size
    raise RuntimeError(
        f"oneDNN's results for a matrix ({outputs}, {inputs}) depend on the number of rows ({count}) or of threads "
        f"({threads}) on this machine; set THINKSTACK_KERNELS=0"
    )


@functools.cache
def is_batch_invariant(outputs: int, inputs: int, threads: int) -> bool:
    """Whether `prepacked_linear` in fp32 supports a matrix (outputs, inputs) with torch's current number of threads,
    `threads`: two rows and REORDER_ROWS rows, which can replace others, equal the reference."""
    return all(equals_reference(outputs, inputs, count) for count in (2, mkldnn.REORDER_ROWS))


def equals_reference(outputs: int, inputs: int, count: int) -> bool:
    """Whether each of `count` equal rows has the result of the reference, bit for bit, wherever it is."""
    row, matrix, expected = _reference(min(outputs, MAX_TESTED_OUTPUTS + outputs % mkldnn.REORDER_ROWS), inputs)
    return bool((mkldnn.linear(row.repeat(count, 1), matrix) == expected).all())


@functools.lru_cache(maxsize=8)
def _reference(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random row (1, K), a random prepacked matrix (N, K), and their product (N,) as one of two rows on one
    thread."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, inputs, generator=generator)
    matrix = mkldnn.prepack(torch.randn(outputs, inputs, generator=generator))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return row, matrix, mkldnn.linear(row.repeat(2, 1), matrix)[0]
    finally:
        torch.set_num_threads(threads)


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
    if weight.dtype != torch.float32 or not can_prepack_all(weight):
        return None
    return mkldnn.prepack(weight) if is_batch_invariant(*weight.shape, torch.get_num_threads()) else None
