"""The interface of a quantization scheme, `quantize` and `dequantize_`, and the quantized matrices."""

# Shapes in this file: N outputs, K inputs, leading dimensions (...) are independent matrices.

from dataclasses import dataclass
from typing import Protocol

import torch
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


@dataclass(frozen=True)
class QuantizedTensor:
    """Quantized matrices (..., N, K) in a scheme; `ops.dequantize` converts them to floats."""

    scheme: QuantScheme
    parts: Parts
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Default dtype of the dequantized matrices."""

    def at(self, index: tuple[int | Tensor, ...]) -> "QuantizedTensor":
        """The matrices at `index` of the leading dimensions: views, or copies if `index` contains a tensor."""
        parts = {name: part[index] for name, part in self.parts.items()}
        leading = next(iter(parts.values())).shape[:-2]
        return QuantizedTensor(self.scheme, parts, (*leading, *self.shape[-2:]), self.dtype)
