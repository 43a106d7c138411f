"""Matmuls of block-scaled e4m3 matrices, as in DeepSeek-V3's training (V3 report, arXiv:2412.19437, section 3.3)."""

# Shapes in this file: M rows, K inputs (reduction dimension), N outputs.

import torch
import torch.nn.functional as F
from torch import Tensor

from thinkstack.quant.fp8 import dequantize

Scaled = tuple[Tensor, Tensor]
"""e4m3 numbers and the scales of their blocks, from quant/fp8.py."""


def dequantized_matmul(a: Scaled, b: Scaled, b_rows: int, dtype: torch.dtype) -> Tensor:
    """As `ops.scaled_matmul`, with dequantized matrices in fp32."""
    return (dequantize(*a, 1) @ dequantize(*b, b_rows).mT).to(dtype)


def device_matmul(a: Scaled, b: Scaled, b_rows: int, dtype: torch.dtype) -> Tensor:
    """As `ops.scaled_matmul` for two matrices, with torch's scaled_mm, which requires 1 x 128 scales in column-major
    order and 128 x 128 scales padded to a multiple of four."""
    row_block = F.ScalingType.BlockWise1x128
    scale_a, scale_b = a[1].t().contiguous().t(), b[1]
    if b_rows == 1:
        recipe, scale_b = row_block, scale_b.t().contiguous().t()
    else:
        recipe, scale_b = F.ScalingType.BlockWise128x128, F.pad(scale_b, (0, -scale_b.shape[1] % 4)).t()
    out = F.scaled_mm(a[0], b[0].t(), scale_a, row_block, scale_b, recipe, output_dtype=torch.bfloat16)
    return out.to(dtype)
