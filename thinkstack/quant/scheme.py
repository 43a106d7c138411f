"""How a matrix is kept in few bits: a scheme is a value with two functions, `pack` and `unpack`."""

# Shapes in this file: N outputs, K inputs, leading dimensions (...) are independent matrices.

from typing import Protocol

from torch import Tensor

Parts = dict[str, Tensor]
"""What a storage makes of matrices (..., N, K): tensors by name, two dimensions each behind the same leading ones."""


class QuantScheme(Protocol):
    """How matrices are kept."""

    @property
    def name(self) -> str:
        """For messages and commands."""

    def quantize(self, weight: Tensor) -> Parts:
        """The parts of weight (..., N, K), a float tensor on any device, meta included."""

    def dequantize_(self, parts: Parts, out: Tensor) -> None:
        """Write the matrices that `parts` stand for into out (..., N, K), rounded once to its dtype."""
