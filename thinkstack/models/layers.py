"""Norm, rotary position embedding, linear layer and feed-forward of a block.

RMSNorm and SwiGLU have custom backward passes: on a CPU these operations are memory-bound, and autograd's composite
backward pass moves two to three times the necessary bytes. Without gradients the forward function is called directly.
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
"""Rows of a matmul are padded to a multiple of this, so that the fp32 result of a row does not depend on the number of
rows."""


class _RMSNorm(torch.autograd.Function):
    """y = x / rms(x) * weight, computed in fp32 and returned in x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        if kernels.takes_rows(x, "rms_norm"):
            x = x if kernels.is_rows(x) else x.contiguous()
            out, inverse = kernels.rms_norm(x, weight.float(), eps, return_inverse=True)
            ctx.save_for_backward(x, inverse, weight)
            return out
        upcast = x.float()
        rstd = torch.rsqrt(torch.linalg.vecdot(upcast, upcast).div_(x.shape[-1]).add_(eps)).unsqueeze(-1)
        normed = upcast * rstd  # (..., D) fp32
        ctx.save_for_backward(normed, rstd, weight)
        return (normed * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        normed, rstd, weight = ctx.saved_tensors
        if kernels.takes_rows(grad, "rms_norm"):
            grad_x, grad_weight = kernels.rms_norm_backward(grad, normed, weight.float(), rstd)
            return grad_x, grad_weight.to(weight.dtype), None
        upcast = grad.float()
        grad_normed = upcast * normed
        inner = torch.linalg.vecdot(grad_normed, weight.float()).div_(normed.shape[-1]).unsqueeze(-1)
        grad_x = torch.addcmul(upcast * weight.float(), normed, inner, value=-1).mul_(rstd)
        grad_weight = grad_normed.reshape(-1, normed.shape[-1]).sum(0)
        return grad_x.to(grad.dtype), grad_weight.to(weight.dtype), None


class RMSNorm(nn.Module):
    """Root-mean-square norm with a trained scale (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width), any float dtype. Returns the same shape and dtype, computed in fp32."""
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, self.weight, self.eps)
        if kernels.takes_rows(x, "rms_norm") and kernels.is_rows(x):
            return kernels.rms_norm(x, self.weight.float(), self.eps, return_inverse=False)[0]
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return swiglu_backward(grad, *ctx.saved_tensors)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (arXiv:2002.05202)."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else swiglu_forward(gate, up)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` without autograd."""
    if kernels.takes_rows(gate, "swiglu") and gate.is_contiguous() and up.is_contiguous():
        return kernels.swiglu(gate, up)
    return F.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` with respect to gate and up."""
    if kernels.takes_rows(gate, "swiglu") and gate.is_contiguous() and up.is_contiguous():
        return kernels.swiglu_backward(grad, gate, up)
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class Embedding(nn.Embedding):
    """nn.Embedding without initialization on the meta device."""

    def reset_parameters(self) -> None:
        """Skip the meta device, where torch would import its compiler to initialize."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Linear(nn.Linear):
    """A linear layer whose bias may be fp32 with a bf16 matrix, as in copies made by precision.cast_copy."""

    prepacked: PrepackedMatrix | None = None
    """A second, prepacked copy of the matrix for inference in bf16 (`prepack_weights`)."""

    def reset_parameters(self) -> None:
        """See Embedding."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features). Returns (..., out_features). A few bf16 rows use the small-M kernel."""
        if self.bias is None and kernels.takes_small_m(x, self.weight):
            return kernels.small_m_linear(x, self.weight)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.prepacked is not None and self.prepacked.takes(x):
            return self.prepacked.linear(x, self.weight, bias)
        return upcast_linear(x, self.weight, bias)


def prepack_weights(model: nn.Module) -> None:
    """Make the linear layers of a bf16 model use prepacked copies of their current matrices, if memory suffices."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    fits = fits_prepacked(*(layer.weight for layer in layers if layer.weight.dtype == torch.bfloat16))
    for layer in layers:
        layer.prepacked = PrepackedMatrix() if fits and layer.weight.dtype == torch.bfloat16 else None


class SwiGLU(nn.Module):
    """Feed-forward w2(silu(w1 x) * (w3 x)), with the names of the paper."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.w1 = Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = Linear(intermediate_size, hidden_size, bias=False)
        self.w3 = Linear(hidden_size, intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D); returns (..., D)."""
        return self.w2(swiglu(self.w1(x), self.w3(x)))


@functools.cache
def rope_frequencies(width: int, cfg: RopeConfig) -> Tensor:
    """Angular frequencies in radians per token, (width / 2,) fp32, with the configured context extension applied.

    Source: arXiv:2104.09864; for YaRN, precompute_freqs_cis in DeepSeek-V3 inference/model.py; for Llama 3,
    arXiv:2407.21783 and rope_scaling in the released config.json.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    frequencies = 1.0 / cfg.theta**exponents
    if cfg.llama3 is not None:
        rotations = frequencies * (cfg.llama3.original_max_positions / (2 * math.pi))  # within the original context
        low, high = cfg.llama3.low_freq_factor, cfg.llama3.high_freq_factor
        ramp = ((rotations - low) / (high - low)).clamp(0, 1)
        return frequencies / cfg.llama3.factor * (1 - ramp) + frequencies * ramp
    if cfg.yarn is None:
        return frequencies / cfg.linear_factor
    low, high = yarn_range(width, cfg.theta, cfg.yarn)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / cfg.yarn.factor * ramp + frequencies * (1 - ramp)


@functools.lru_cache(maxsize=64)
def _frequencies_on(width: int, cfg: RopeConfig, device: torch.device) -> Tensor:
    """`rope_frequencies` on a device; computed on the CPU and copied once, so that the values are equal on all
    devices."""
    return rope_frequencies(width, cfg).to(device)


def yarn_range(width: int, theta: float, yarn: YarnConfig) -> tuple[float, float]:
    """Indices (low, high) between which YaRN interpolates: frequencies below `low` are unchanged, frequencies above
    `high` are divided by the factor."""

    def pair_with(rotations: float) -> float:
        return width * math.log(yarn.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), width - 1)
    return low, high if high != low else high + 0.001


def rope_table(positions: Tensor, width: int, cfg: RopeConfig) -> Tensor:
    """RopeCache cos + i sin for integer positions (B, T): (B, T, width / 2) complex64."""
    angles = positions[..., None].float() * _frequencies_on(width, cfg, positions.device)
    amplitude = torch.ones_like(angles)
    if cfg.yarn is not None:
        amplitude *= yarn_mscale(cfg.yarn.factor, cfg.yarn.mscale) / yarn_mscale(
            cfg.yarn.factor, cfg.yarn.mscale_all_dim
        )
    return torch.polar(amplitude, angles)


class RopeCache:
    """`rope_table` for inference: a table of all positions up to the largest position so far; grows by powers of 2."""

    def __init__(self, width: int, cfg: RopeConfig):
        self.width, self.cfg = width, cfg
        self.table = torch.empty(0, width // 2, dtype=torch.complex64)

    def lookup(self, positions: Tensor) -> Tensor:
        """Table entries of positions (N,): (N, width / 2) complex64."""
        last = int(positions.max())
        if last >= len(self.table):
            self.table = rope_table(torch.arange(1 << last.bit_length()).unsqueeze(0), self.width, self.cfg)[0]
        return self.table.index_select(0, positions)


class _Rotate(torch.autograd.Function):
    """Pairs as complex numbers times the table; the gradient is rotated by the negative angles."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, interleaved: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(table)
        ctx.interleaved = interleaved
        return apply_rotation(x, table, interleaved)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return apply_rotation(grad, ctx.saved_tensors[0], ctx.interleaved, inverse=True), None, None


def rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """Rotate heads x (B, T, H, R) by the table of their positions (B, T, R / 2), in fp32. Returns x's shape and
    dtype."""
    return _Rotate.apply(x, table, interleaved) if torch.is_grad_enabled() else apply_rotation(x, table, interleaved)


def apply_rotation(x: Tensor, table: Tensor, interleaved: bool, inverse: bool = False) -> Tensor:
    """`rotate` without autograd. inverse: rotate by the negative angles, which undoes `rotate` if the amplitude of the
    table is 1."""
    if kernels.takes_rows(x, "rope") and kernels.is_rows(x[:, :, 0]) and x.stride(-1) == 1:
        return kernels.rotate(x, table, interleaved, inverse)
    table = (table.conj() if inverse else table).unsqueeze(2)
    pairs = x.float().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = (pairs if interleaved else pairs.transpose(-1, -2)).contiguous()
    rotated = torch.view_as_real(torch.view_as_complex(pairs) * table)
    return (rotated if interleaved else rotated.transpose(-1, -2)).flatten(-2).to(x.dtype)
