"""Modules with quantized weights that are dequantized at each use, for inference and as the frozen base of adapters.

`quantize_model` replaces the linear layers and the stacks of routed experts of a model by quantized modules in any
QuantScheme; `dequantize_model` reverts this. Only experts with routed tokens are dequantized. Matmuls of a few bf16
rows use 8-bit weights directly. Gradients flow to the input; the weights have no gradient."""

# Shapes in this file: N outputs, K inputs, leading dimensions (...) are independent matrices, E experts, P matrices
# stacked in one parameter (gate and up: 2), U experts in use, D hidden size, I intermediate size of one expert.

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thinkstack import kernels
from thinkstack.kernels import triton
from thinkstack.kernels.cpu.prepacked import product_dtype, upcast_linear
from thinkstack.kernels.dequantize import dequantize_
from thinkstack.models.moe import MoE, expert_mlp
from thinkstack.models.transformer import Transformer
from thinkstack.quant.fp8 import FP8Blocks
from thinkstack.quant.int8 import Int8
from thinkstack.quant.scheme import Parts, QuantScheme

M = TypeVar("M", bound=Transformer)

Index = tuple[int | Tensor, ...]


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

    def parts(self, index: Index = ()) -> Parts:
        """The parts of the matrices at `index` of the leading dimensions: views, or copies if `index` contains a
        tensor."""
        return {name: part[index] for name, part in self.named_buffers()}

    def set_parts(self, index: Index, parts: Parts) -> None:
        """Overwrite the parts of the matrices at `index`."""
        for name, part in self.parts(index).items():
            part.copy_(parts[name])

    def dequantize(self, index: Index = (), dtype: torch.dtype | None = None) -> Tensor:
        """The matrices at `index`, dequantized to `dtype`; None: the dtype of the module."""
        parts = self.parts(index)
        first = next(iter(parts.values()))
        out = torch.empty(*first.shape[:-2], *self.shape[-2:], dtype=dtype or self.dtype, device=first.device)
        dequantize_(self.quantization, parts, out)
        return out

    def dequantize_parameter(self) -> Tensor:
        """All matrices, dequantized, in the shape of the parameter of a plain model."""
        weight = self.dequantize()
        return weight.flatten(1, 2) if weight.dim() > 2 else weight


class _DequantizedLinear(torch.autograd.Function):
    """x (..., K) times a quantized matrix (N, K) transposed, plus bias (N,) or None; the backward pass dequantizes
    again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: QuantizedWeight, bias: Tensor | None) -> Tensor:
        ctx.quantized = quantized
        return upcast_linear(x, quantized.dequantize(dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None]:  # type: ignore[override]
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        weight, dtype = ctx.quantized.dequantize(dtype=grad.dtype), product_dtype(grad)
        return (grad.to(dtype) @ weight.to(dtype)).to(grad.dtype), None, grad_bias


class QuantizedLinear(nn.Linear):
    """A linear layer with a quantized matrix; `weight` is the dequantized matrix."""

    def __init__(self, quantized: QuantizedWeight, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantized.shape
        self.quantized = quantized
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.quantized.dequantize()

    def parts_8bit(self) -> Parts | None:
        """The parts qweight (N, K) and scale of an 8-bit scheme; None for other schemes."""
        return self.quantized.parts() if isinstance(self.quantized.quantization, Int8 | FP8Blocks) else None

    def int8_parts(self) -> Parts | None:
        """The parts qweight (N, K) and scale (N, 1) of int8, which kernels read directly; None for other schemes."""
        return self.quantized.parts() if isinstance(self.quantized.quantization, Int8) else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K). Returns (..., N). A few rows use kernels that read 8-bit weights directly."""
        parts, bias = self.parts_8bit(), None if self.bias is None else self.bias.to(x.dtype)
        if parts is not None and triton.takes_quantized(x, parts["qweight"]):
            out = triton.quantized_linear(x, parts["qweight"], parts["scale"].float())
            return out if bias is None else out + bias
        if parts is not None and bias is None and kernels.takes_small_m(x, parts["qweight"]):
            return kernels.small_m_linear(x, parts["qweight"], parts["scale"])
        return _DequantizedLinear.apply(x, self.quantized, bias)


class QuantizedExperts(nn.Module):
    """Computes routed experts from quantized stacks w_in (E, 2, I, D) and w_out (E, 1, D, I)."""

    def forward(
        self, x: Tensor, weights: Tensor, experts: Tensor, w_in: QuantizedWeight, w_out: QuantizedWeight
    ) -> Tensor:
        """Arguments and result as in ExpertMLP of models/moe.py, except for the stacks."""
        used, place = experts.unique(return_inverse=True)  # (U,), (N, K)

        def compute(x: Tensor, weights: Tensor) -> Tensor:
            dequantized = (stack.dequantize((used,), x.dtype).flatten(1, 2) for stack in (w_in, w_out))
            return expert_mlp(x, weights, place, *dequantized)

        if torch.is_grad_enabled():  # the backward pass dequantizes the experts again instead of saving them
            return checkpoint(compute, x, weights, use_reentrant=False, preserve_rng_state=False)
        return compute(x, weights)


EXPERT_STACKS = {"w_in": 2, "w_out": 1}
"""Number of matrices per expert in each stacked parameter of MoE."""


def quantizable_matrices(model: Transformer) -> list[str]:
    """Names of the parameters to quantize: the matrices of all blocks except routers."""
    found = []
    for name, module in model.named_modules():
        if ".attention." in name or ".ffn" in name:
            found += [f"{name}.weight"] if isinstance(module, nn.Linear) else []
            found += [f"{name}.{leaf}" for leaf in EXPERT_STACKS] if isinstance(module, MoE) else []
    return found


def quantize_model(
    model: Transformer, quantization: QuantScheme, names: Collection[str], dtype: torch.dtype | None = None
) -> None:
    """Quantize the named parameters in place; also works on the meta device.

    names: names in state_dict of linear layers and stacks of experts (both stacks of a layer or neither). dtype: the
    default dtype of dequantized matrices; None: the dtype of the parameter.
    """
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = getattr(module, leaf).detach()
        if isinstance(module, MoE):
            stack = weight.unflatten(1, (EXPERT_STACKS[leaf], -1))
            delattr(module, leaf)
            setattr(module, leaf, QuantizedWeight(quantization, stack, dtype or weight.dtype))
            module.expert_module = QuantizedExperts()
        else:
            assert isinstance(module, nn.Linear), name
            parent, _, place = owner.rpartition(".")
            layer = QuantizedLinear(QuantizedWeight(quantization, weight, dtype or weight.dtype), module.bias)
            setattr(model.get_submodule(parent), place, layer)


def dequantize_model(model: M) -> M:
    """Convert all quantized weights to parameters, in place; returns the model."""
    for name, quantized in quantized_weights(model).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, MoE):
            weight = nn.Parameter(quantized.dequantize_parameter())
            delattr(module, leaf)
            setattr(module, leaf, weight)
            module.expert_module = None
        else:
            assert isinstance(module, QuantizedLinear)
            parent, _, place = owner.rpartition(".")
            layer = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            layer.weight, layer.bias = nn.Parameter(quantized.dequantize_parameter()), module.bias
            setattr(model.get_submodule(parent), place, layer)
    return model


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The quantized weights of a model, by the name of the parameter in a plain model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            owner, _, leaf = name.rpartition(".")
            found[f"{owner}.weight" if leaf == "quantized" else name] = module
    return found
