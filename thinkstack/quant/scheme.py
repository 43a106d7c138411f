"""The interface of a quantization scheme: `quantize` and `dequantize_`."""

# Shapes in this file: N outputs, K inputs, leading dimensions (...) are independent matrices.

from typing import Protocol

from torch import Tensor

Parts = dict[str, Tensor]
"""The tensors of quantized matrices (..., N, K), by name (`qweight`, `scale`). Each has the leading dimensions of the
matrices and two further dimensions."""


class QuantScheme(Protocol):
    """A format of quantized weights, with functions to quantize and dequantize."""

    @property
    def name(self) -> str:
        """Name of the scheme in messages and settings."""

    def quantize(self, weight: Tensor) -> Parts:
        """Quantize weight (..., N, K), a float tensor on any device, meta included."""

    def dequantize_(self, parts: Parts, out: Tensor) -> None:
        """Write the dequantized matrices into out (..., N, K), rounded once to its dtype."""
