"""Matrices in 8-bit integers, one scale for each output."""

# Shapes in this file: N outputs, K inputs, leading dimensions (...) are independent matrices.

from dataclasses import dataclass

import torch
from torch import Tensor

from thinkstack.quant.scheme import Parts


@dataclass(frozen=True)
class Int8:
    """Whole numbers from -127 to 127, one scale for each output: the largest magnitude of its row / 127."""

    @property
    def name(self) -> str:
        return "int8"

    def quantize(self, weight: Tensor) -> Parts:
        wide = weight.float()
        scale = (wide.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # (..., N, 1)
        return {"qweight": (wide / scale).round().to(torch.int8), "scale": scale}

    def dequantize_(self, parts: Parts, out: Tensor) -> None:
        out.copy_(parts["qweight"] * parts["scale"])
