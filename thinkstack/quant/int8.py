"""int8 quantization of matrices with per-row scales (one scale per output)."""

# Shapes in this file: N outputs, K inputs, leading dimensions (...) are independent matrices.

from dataclasses import dataclass

import torch
from torch import Tensor

from thinkstack.quant.scheme import Parts


@dataclass(frozen=True)
class Int8:
    """Symmetric int8 in -127..127; the per-row scale is the largest magnitude of the row divided by 127."""

    @property
    def name(self) -> str:
        return "int8"

    def quantize(self, weight: Tensor) -> Parts:
        weight = weight.float()
        scale = (weight.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # (..., N, 1)
        return {"qweight": (weight / scale).round().to(torch.int8), "scale": scale}

    def dequantize_(self, parts: Parts, out: Tensor) -> None:
        out.copy_(parts["qweight"] * parts["scale"])
