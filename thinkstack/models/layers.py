"""Norm, rotary embedding and feed-forward: the pieces every block shares.

RMSNorm and SwiGLU carry their own backward passes: on a CPU these operations are bound by memory, and autograd's
composite passes move two to three times the bytes that the formulas need. Without gradients they are not used.
"""

# Shapes in this file: B rows, T tokens, D hidden size, I intermediate size, H heads, R rotated width.

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkstack import kernels
from thinkstack.kernels.cpu.prepacked import PrepackedMatrix, fits_prepacked, upcast_linear
from thinkstack.models.attention_config import RopeConfig, YarnConfig, yarn_mscale

ROW_TILE = 16
"""Rows of a matrix product come in multiples of this: then a row's fp32 result does not depend on how many others
there are."""


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * weight, computed in fp32 and returned in x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        if kernels.takes_rows(x, "rms_norm"):
            x = x if kernels.is_rows(x) else x.contiguous()
            out, inverse = kernels.rms_norm(x, weight.float(), eps, keep=True)
            ctx.save_for_backward(x, inverse, weight)
            return out
        wide = x.float()
        rstd = torch.rsqrt(torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps)).unsqueeze(-1)
        normed = wide * rstd  # (..., D) fp32
        ctx.save_for_backward(normed, rstd, weight)
        return (normed * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        normed, rstd, weight = ctx.saved_tensors
        if kernels.takes_rows(grad, "rms_norm"):
            grad_x, grad_weight = kernels.rms_norm_backward(grad, normed, weight.float(), rstd)
            return grad_x, grad_weight.to(weight.dtype), None
        wide = grad.float()
        grad_normed = wide * normed
        inner = torch.linalg.vecdot(grad_normed, weight.float()).div_(normed.shape[-1]).unsqueeze(-1)
        grad_x = torch.addcmul(wide * weight.float(), normed, inner, value=-1).mul_(rstd)
        grad_weight = grad_normed.reshape(-1, normed.shape[-1]).sum(0)
        return grad_x.to(grad.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnt scale (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width) in any float dtype; returns the same shape and dtype, computed in fp32."""
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, self.weight, self.eps)
        if kernels.takes_rows(x, "rms_norm") and kernels.is_rows(x):
            return kernels.rms_norm(x, self.weight.float(), self.eps, keep=False)[0]
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return activate(gate, up)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return swiglu_backward(grad, *ctx.saved_tensors)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (arXiv:2002.05202)."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else activate(gate, up)


def activate(gate: Tensor, up: Tensor) -> Tensor:
    """The arithmetic of `swiglu`."""
    if kernels.takes_rows(gate, "swiglu") and gate.is_contiguous() and up.is_contiguous():
        return kernels.swiglu(gate, up)
    return F.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of swiglu with respect to gate and up."""
    if kernels.takes_rows(gate, "swiglu") and gate.is_contiguous() and up.is_contiguous():
        return kernels.swiglu_backward(grad, gate, up)
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class Embedding(nn.Embedding):
    """A table of vectors."""

    def reset_parameters(self) -> None:
        """Nothing on the meta device: torch would import its compiler to draw numbers that do not exist."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Projection(nn.Linear):
    """A linear layer whose bias may stay fp32 beside a matrix in bf16, as precision.working_copy keeps vectors."""

    prepacked: PrepackedMatrix | None = None
    """The matrix a second time, for inference in bf16 (`prepack_weights`)."""

    def reset_parameters(self) -> None:
        """As of Embedding."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features); returns (..., out_features). A few rows in bf16 are multiplied as weights are read."""
        if self.bias is None and kernels.takes_small_m(x, self.weight):
            return kernels.small_m_linear(x, self.weight)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.prepacked is not None and self.prepacked.takes(x):
            return self.prepacked.product(x, self.weight, bias)
        return upcast_linear(x, self.weight, bias)


def prepack_weights(model: nn.Module) -> None:
    """Let the linear layers of a bf16 model keep their matrices blocked, from what they hold now, where they can."""
    layers = [module for module in model.modules() if isinstance(module, Projection)]
    keeps = fits_prepacked(*(layer.weight for layer in layers if layer.weight.dtype == torch.bfloat16))
    for layer in layers:
        layer.prepacked = PrepackedMatrix() if keeps and layer.weight.dtype == torch.bfloat16 else None


class SwiGLU(nn.Module):
    """Feed-forward w2(silu(w1 x) * (w3 x)), in the paper's names."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.w1 = Projection(hidden_size, intermediate_size, bias=False)
        self.w2 = Projection(intermediate_size, hidden_size, bias=False)
        self.w3 = Projection(hidden_size, intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D); returns (..., D)."""
        return self.w2(swiglu(self.w1(x), self.w3(x)))


@functools.cache
def rope_frequencies(width: int, cfg: RopeConfig) -> Tensor:
    """Angular frequencies in radians per token, (width / 2,) fp32, changed by the extension that is configured.

    Source: arXiv:2104.09864; for YaRN DeepSeek-V3 inference/model.py, precompute_freqs_cis; for Llama 3
    arXiv:2407.21783 and the rope_scaling of its released config.json.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequencies = 1.0 / cfg.theta**exponents
    if cfg.llama3 is not None:
        turns = frequencies * (cfg.llama3.original_max_positions / (2 * math.pi))  # within the original context
        low, high = cfg.llama3.low_freq_factor, cfg.llama3.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies / cfg.llama3.factor * (1 - kept) + frequencies * kept
    if cfg.yarn is None:
        return frequencies / cfg.linear_factor
    low, high = yarn_range(width, cfg.theta, cfg.yarn)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / cfg.yarn.factor * ramp + frequencies * (1 - ramp)


@functools.lru_cache(maxsize=64)
def _frequencies_on(width: int, cfg: RopeConfig, device: torch.device) -> Tensor:
    """`rope_frequencies` there; the same numbers everywhere, brought to a device once."""
    return rope_frequencies(width, cfg).to(device)


def yarn_range(width: int, theta: float, yarn: YarnConfig) -> tuple[float, float]:
    """Pair indices between which YaRN blends: below the first nothing changes, above the second all is stretched."""

    def pair_with(rotations: float) -> float:
        return width * math.log(yarn.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), width - 1)
    return low, high if high != low else high + 0.001


def rope_table(positions: Tensor, width: int, cfg: RopeConfig) -> Tensor:
    """Rotations cos + i sin for integer positions (B, T): (B, T, width / 2) complex64."""
    angles = positions[..., None].float() * _frequencies_on(width, cfg, positions.device)
    amplitude = torch.ones_like(angles)
    if cfg.yarn is not None:
        amplitude *= yarn_mscale(cfg.yarn.factor, cfg.yarn.mscale) / yarn_mscale(
            cfg.yarn.factor, cfg.yarn.mscale_all_dim
        )
    return torch.polar(amplitude, angles)


class Rotations:
    """`rope_table` for inference: all positions up to the largest so far are kept, and looked up."""

    def __init__(self, width: int, cfg: RopeConfig):
        self.width, self.cfg = width, cfg
        self.table = torch.empty(0, width // 2, dtype=torch.complex64)

    def at(self, positions: Tensor) -> Tensor:
        """Of positions (N,): (N, width / 2) complex64."""
        last = int(positions.max())
        if last >= len(self.table):
            self.table = rope_table(torch.arange(1 << last.bit_length()).unsqueeze(0), self.width, self.cfg)[0]
        return self.table.index_select(0, positions)


class _Rotate(torch.autograd.Function):
    """Pairs as complex numbers times the table; the gradient turns back."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, interleaved: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(table)
        ctx.interleaved = interleaved
        return turn(x, table, interleaved)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return turn(grad, ctx.saved_tensors[0], ctx.interleaved, back=True), None, None


def rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """Rotate heads x (B, T, H, R) by the table of their positions (B, T, R / 2), in fp32; keeps x's shape and dtype."""
    return _Rotate.apply(x, table, interleaved) if torch.is_grad_enabled() else turn(x, table, interleaved)


def turn(x: Tensor, table: Tensor, interleaved: bool, back: bool = False) -> Tensor:
    """The arithmetic of `rotate`; back: the other way round, which undoes it where the table's amplitude is 1."""
    if kernels.takes_rows(x, "rope") and kernels.is_rows(x[:, :, 0]) and x.stride(-1) == 1:
        return kernels.rotate(x, table, interleaved, back)
    table = (table.conj() if back else table).unsqueeze(2)
    pairs = x.float().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = (pairs if interleaved else pairs.transpose(-1, -2)).contiguous()
    turned = torch.view_as_real(torch.view_as_complex(pairs) * table)
    return (turned if interleaved else turned.transpose(-1, -2)).flatten(-2).to(x.dtype)
