"""Norm, rotary position embedding, linear layer and feed-forward of a block."""

# Shapes in this file: B rows, T tokens, D hidden size, N outputs and K inputs of quantized matrices; leading dimensions
# (...) are independent matrices.

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from thinkstack.kernels import ops
from thinkstack.kernels.ops import Matrix, PrepackedMatrix
from thinkstack.models.attention_config import RopeConfig, YarnConfig, yarn_mscale
from thinkstack.quant.scheme import Parts, QuantizedTensor, QuantScheme

Index = tuple[int | Tensor, ...]


class RMSNorm(nn.Module):
    """Root-mean-square norm with a trained scale (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width), any float dtype. Returns the same shape and dtype, computed in fp32."""
        return ops.rms_norm(x, self.weight, self.eps)


class Embedding(nn.Embedding):
    """nn.Embedding with uninitialized memory: its values are from `Transformer.initialize` or a checkpoint."""

    def reset_parameters(self) -> None:
        """Leave the memory uninitialized."""


class Linear(nn.Linear):
    """A linear layer with uninitialized memory, as Embedding. Its bias may be fp32 with a bf16 matrix, as in copies
    made by precision.cast_copy."""

    prepacked: PrepackedMatrix | None = None
    """A second, prepacked copy of the matrix for inference in bf16 (`prepack_weights`)."""

    def reset_parameters(self) -> None:
        """Leave the memory uninitialized."""

    @property
    def matrix(self) -> Matrix:
        """The matrix (out_features, in_features) as it is stored: floats or quantized."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features). Returns (..., out_features)."""
        return ops.linear(x, self.matrix, self.bias, self.prepacked)


def prepack_weights(model: nn.Module) -> None:
    """Make the linear layers of a bf16 model use prepacked copies of their current matrices, if memory suffices."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    matrices = {layer: layer.matrix for layer in layers}
    floats = {layer: matrix for layer, matrix in matrices.items() if isinstance(matrix, Tensor)}
    for layer, copy in zip(floats, ops.prepack(floats.values()), strict=True):
        layer.prepacked = copy


class QuantizedWeight(nn.Module):
    """Quantized matrices (..., N, K). The parts are buffers that move with the model to devices and are never cast."""

    def __init__(self, quantization: QuantScheme, weight: Tensor, dtype: torch.dtype):
        """Quantize weight (..., N, K). dtype: the default dtype of `dequantize`."""
        super().__init__()
        self.quantization, self.shape, self.dtype = quantization, tuple(weight.shape), dtype
        for name, part in quantization.quantize(weight).items():
            self.register_buffer(name, part)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        """Move without casting: `fn` gets the parts as bytes, so that casts of floats do not apply."""
        for name, part in self._buffers.items():
            assert part is not None
            self._buffers[name] = fn(part.view(torch.uint8)).view(part.dtype)
        return self

    @property
    def tensor(self) -> QuantizedTensor:
        """The matrices for ops.py."""
        parts = {name: part for name, part in self._buffers.items() if part is not None}
        return QuantizedTensor(self.quantization, parts, self.shape, self.dtype)

    def parts(self, index: Index = ()) -> Parts:
        """The parts of the matrices at `index` of the leading dimensions: views, or copies if `index` contains a
        tensor."""
        return self.tensor.at(index).parts

    def set_parts(self, index: Index, parts: Parts) -> None:
        """Overwrite the parts of the matrices at `index`."""
        for name, part in self.parts(index).items():
            part.copy_(parts[name])

    def dequantize(self, index: Index = (), dtype: torch.dtype | None = None) -> Tensor:
        """The matrices at `index`, dequantized to `dtype`; None: the dtype of the module."""
        return ops.dequantize(self.tensor.at(index), dtype)

    def dequantize_parameter(self) -> Tensor:
        """All matrices, dequantized, in the shape of the parameter of a plain model."""
        weight = self.dequantize()
        return weight.flatten(1, 2) if weight.dim() > 2 else weight


class QuantizedLinear(Linear):
    """A linear layer with a quantized matrix; `weight` is the dequantized matrix."""

    def __init__(self, quantized: QuantizedWeight, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantized.shape
        self.quantized = quantized
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.quantized.dequantize()

    @property
    def matrix(self) -> Matrix:
        return self.quantized.tensor


class SwiGLU(nn.Module):
    """Feed-forward w2(silu(w1 x) * (w3 x)), with the names of the paper."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.w1 = Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = Linear(intermediate_size, hidden_size, bias=False)
        self.w3 = Linear(hidden_size, intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., D); returns (..., D)."""
        return self.w2(ops.swiglu(self.w1(x), self.w3(x)))


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
