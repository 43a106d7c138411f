"""Numbers in 8-bit floats (e4m3) with one scale a block, as DeepSeek-V3 trains and stores (V3 report, arXiv:2412.19437,
section 3.3)."""

# Shapes in this file: M rows, K summed over, N outputs, leading dimensions (...) are independent matrices.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thinkstack.quant.scheme import Parts

BLOCK = 128

E4M3 = torch.float8_e4m3fn

LARGEST = 448.0
"""The largest number of e4m3; it has 3 bits of fraction, so rounding is within 2**-4 of a normal number."""

SMALLEST_PEAK = 1e-30
"""A block's peak counts at least this. DeepSeek's inference code has 1e-4, below which gradients live."""


def quantize(x: Tensor, rows: int, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """x (..., M, K) in blocks of `rows` x 128, ragged at the edges.

    power_of_two: scales of the form 2**n, rounded up (ue8m0), which lose no bit where they are taken out again.
    Returns (e4m3 (..., M, K), scales (..., ceil(M / rows), ceil(K / 128)) fp32); x is about their product.
    """
    M, K = x.shape[-2:]
    blocks = F.pad(x.float(), (0, -K % BLOCK, 0, -M % rows)).unflatten(-2, (-1, rows)).unflatten(-1, (-1, BLOCK))
    peak = blocks.abs().amax((-3, -1)).clamp(min=SMALLEST_PEAK)  # (..., M / rows, K / 128)
    scale = peak / LARGEST
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    small = blocks / scale[..., :, None, :, None]
    return small.flatten(-2).flatten(-3, -2)[..., :M, :K].clamp(-LARGEST, LARGEST).to(E4M3), scale


def dequantize(q: Tensor, scale: Tensor, rows: int) -> Tensor:
    """fp32 (..., M, K) of what `quantize` returned."""
    M, K = q.shape[-2:]
    wide = scale.repeat_interleave(rows, -2)[..., :M, :].repeat_interleave(BLOCK, -1)[..., :K]
    return q.float() * wide


@dataclass(frozen=True)
class FP8Blocks:
    """DeepSeek's files: e4m3 numbers, one scale for 128 x 128 (V3 report, arXiv:2412.19437, section 3.3.1)."""

    power_of_two: bool = False
    """Scales of the form 2**n (scale_fmt ue8m0)."""
    scale_dtype: torch.dtype = torch.float32
    """What scales are kept as: fp32, or float8_e8m0fnu, the exponents alone."""

    @property
    def name(self) -> str:
        return "fp8-ue8m0" if self.power_of_two else "fp8"

    def quantize(self, weight: Tensor) -> Parts:
        qweight, scale = quantize(weight, BLOCK, self.power_of_two)
        return {"qweight": qweight, "scale": scale.to(self.scale_dtype)}

    def dequantize_(self, parts: Parts, out: Tensor) -> None:
        out.copy_(dequantize(parts["qweight"], parts["scale"].float(), BLOCK))
