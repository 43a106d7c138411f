"""4-bit NormalFloat (NF4), the format of the frozen base in QLoRA (arXiv:2305.14314, section 3)."""

# Shapes in this file: N outputs, K inputs, leading dimensions (...) are independent matrices.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from thinkstack.quant.scheme import Parts

BLOCK = 64
"""Number of consecutive inputs with a common scale."""
# Quantiles of a normal distribution, scaled to [-1, 1]; one quantile is 0 (appendix E).
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class NF4Blocks:
    """16 levels, two numbers per byte, and a bf16 scale per 64 numbers: 4.25 bits per number.

    The scale is the largest magnitude of the block, rounded up to bf16. The paper additionally quantizes the scales to
    8 bits (double quantization), which saves another 0.12 bits per number."""

    @property
    def name(self) -> str:
        return "nf4"

    def quantize(self, weight: Tensor) -> Parts:
        blocks = F.pad(weight.float(), (0, -weight.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        peak = blocks.abs().amax(-1).clamp(min=torch.finfo(torch.bfloat16).tiny)  # (..., N, K / 64)
        scale = peak.bfloat16()
        scale = torch.where(scale.float() < peak, peak * (1 + 2**-7), scale.float()).bfloat16()
        levels = torch.tensor(LEVELS, device=weight.device)
        qweight = torch.bucketize(blocks / scale.float().unsqueeze(-1), (levels[1:] + levels[:-1]) / 2)
        pairs = qweight.to(torch.uint8).flatten(-2).unflatten(-1, (-1, 2))
        return {"qweight": pairs[..., 0] * 16 + pairs[..., 1], "scale": scale}

    def dequantize_(self, parts: Parts, out: Tensor) -> None:
        levels, qweight = torch.tensor(LEVELS, device=out.device), parts["qweight"]
        pairs = torch.stack((levels[(qweight >> 4).int()], levels[(qweight & 15).int()]), -1)
        blocks = pairs.flatten(-2).unflatten(-1, (-1, BLOCK)) * parts["scale"].float().unsqueeze(-1)
        out.copy_(blocks.flatten(-2)[..., : out.shape[-1]])
