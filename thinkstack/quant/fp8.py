"""fp8 (e4m3) with one scale per block, as in DeepSeek-V3's training and checkpoints (V3 report, arXiv:2412.19437,
section 3.3)."""

# Shapes in this file: M rows, K inputs, leading dimensions (...) are independent matrices.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thinkstack.quant.scheme import Parts

BLOCK = 128

E4M3 = torch.float8_e4m3fn

LARGEST = 448.0
"""The largest number of e4m3. The format has 3 fraction bits, so that the relative rounding error of normal numbers is
at most 2**-4."""

SMALLEST_PEAK = 1e-30
"""Lower bound of a block's largest magnitude. DeepSeek's inference code uses 1e-4, but gradients can be smaller."""


def quantize(x: Tensor, rows: int, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize x (..., M, K) in blocks of `rows` x 128; blocks at the edges may be smaller.

    power_of_two: scales of the form 2**n, rounded up (ue8m0), so that multiplication by a scale is exact.
    Returns (e4m3 (..., M, K), scales (..., ceil(M / rows), ceil(K / 128)) fp32); x is approximately e4m3 * scale.
    """
    M, K = x.shape[-2:]
    blocks = F.pad(x.float(), (0, -K % BLOCK, 0, -M % rows)).unflatten(-2, (-1, rows)).unflatten(-1, (-1, BLOCK))
    peak = blocks.abs().amax((-3, -1)).clamp(min=SMALLEST_PEAK)  # (..., M / rows, K / 128)
    scale = peak / LARGEST
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scaled = blocks / scale[..., :, None, :, None]
    return scaled.flatten(-2).flatten(-3, -2)[..., :M, :K].clamp(-LARGEST, LARGEST).to(E4M3), scale


def dequantize(q: Tensor, scale: Tensor, rows: int) -> Tensor:
    """The fp32 matrices (..., M, K) from the results of `quantize`."""
    M, K = q.shape[-2:]
    factors = scale.repeat_interleave(rows, -2)[..., :M, :].repeat_interleave(BLOCK, -1)[..., :K]
    return q.float() * factors


@dataclass(frozen=True)
class FP8Blocks:
    """The format of DeepSeek's checkpoints: e4m3, one scale per 128 x 128 block (V3 report, arXiv:2412.19437, section
    3.3.1)."""

    power_of_two: bool = False
    """Whether scales have the form 2**n (scale_fmt="ue8m0")."""
    scale_dtype: torch.dtype = torch.float32
    """Dtype of the scales: fp32, or float8_e8m0fnu, which has only an exponent."""

    @property
    def name(self) -> str:
        return "fp8-ue8m0" if self.power_of_two else "fp8"

    def quantize(self, weight: Tensor) -> Parts:
        qweight, scale = quantize(weight, BLOCK, self.power_of_two)
        return {"qweight": qweight, "scale": scale.to(self.scale_dtype)}

    def dequantize_(self, parts: Parts, out: Tensor) -> None:
        out.copy_(dequantize(parts["qweight"], parts["scale"].float(), BLOCK))
