"""Matrices kept in few bits and widened where they are used: a model to serve or adapt, not to train as a whole.

A storage is a value with two functions, `quantize_model` and `dequantize_model`. Linear layers and stacks of routed
experts hold packed matrices of any storage; of a stack only the experts that tokens chose are widened. A few rows in
bf16 are multiplied with int8 as it is. Gradients pass through to the input; the packed numbers get none.
"""

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
    """Matrices (..., N, K) in their storage. The parts are buffers that move with the model and are never cast."""

    def __init__(self, quantization: QuantScheme, weight: Tensor, dtype: torch.dtype):
        """Packs weight (..., N, K). dtype: of the matrices that come out where no other is asked for."""
        super().__init__()
        self.quantization, self.shape, self.dtype = quantization, tuple(weight.shape), dtype
        for name, part in quantization.quantize(weight).items():
            self.register_buffer(name, part)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        """Move without casting: a function that casts floats sees bytes."""
        for name, part in self._buffers.items():
            assert part is not None
            self._buffers[name] = fn(part.view(torch.uint8)).view(part.dtype)
        return self

    def parts(self, index: Index = ()) -> Parts:
        """Views of the parts of the matrices at `index` into the leading dimensions; copies where it is a tensor."""
        return {name: part[index] for name, part in self.named_buffers()}

    def put(self, index: Index, parts: Parts) -> None:
        """Replace the matrices at `index`."""
        for name, part in self.parts(index).items():
            part.copy_(parts[name])

    def dequantize(self, index: Index = (), dtype: torch.dtype | None = None) -> Tensor:
        """The matrices at `index`, in `dtype` or else the module's."""
        parts = self.parts(index)
        some = next(iter(parts.values()))
        out = torch.empty(*some.shape[:-2], *self.shape[-2:], dtype=dtype or self.dtype, device=some.device)
        dequantize_(self.quantization, parts, out)
        return out

    def whole(self) -> Tensor:
        """All matrices, widened, in the shape of the parameter that a plain model has."""
        wide = self.dequantize()
        return wide.flatten(1, 2) if wide.dim() > 2 else wide


class _Product(torch.autograd.Function):
    """x (..., K) times packed (N, K) transposed, plus bias (N,) or None; the matrix is widened again going back."""

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
    """A linear layer on a packed matrix; `weight` is the matrix widened, for code that reads it."""

    def __init__(self, quantized: QuantizedWeight, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantized.shape
        self.quantized = quantized
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.quantized.dequantize()

    def parts_8bit(self) -> Parts | None:
        """Codes (N, K) and their blocks' scales; None for another storage."""
        return self.quantized.parts() if isinstance(self.quantized.quantization, Int8 | FP8Blocks) else None

    def int8_parts(self) -> Parts | None:
        """Codes (N, K) and scale (N, 1), which kernels read as they are; None for another storage."""
        return self.quantized.parts() if isinstance(self.quantized.quantization, Int8) else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K); returns (..., N). For a few rows codes of 8 bits are multiplied as they are read."""
        parts, bias = self.parts_8bit(), None if self.bias is None else self.bias.to(x.dtype)
        if parts is not None and triton.takes_quantized(x, parts["qweight"]):
            out = triton.quantized_linear(x, parts["qweight"], parts["scale"].float())
            return out if bias is None else out + bias
        if parts is not None and bias is None and kernels.takes_small_m(x, parts["qweight"]):
            return kernels.small_m_linear(x, parts["qweight"], parts["scale"])
        return _Product.apply(x, self.quantized, bias)


class QuantizedExperts(nn.Module):
    """Computes routed experts whose stacks are packed: w_in (E, 2, I, D), w_out (E, 1, D, I)."""

    def forward(
        self, x: Tensor, weights: Tensor, experts: Tensor, w_in: QuantizedWeight, w_out: QuantizedWeight
    ) -> Tensor:
        """Arguments and result as of ExpertMLP in models/moe.py, but for the stacks."""
        used, place = experts.unique(return_inverse=True)  # (U,), (N, K)

        def compute(x: Tensor, weights: Tensor) -> Tensor:
            wide = (stack.dequantize((used,), x.dtype).flatten(1, 2) for stack in (w_in, w_out))
            return expert_mlp(x, weights, place, *wide)

        if torch.is_grad_enabled():  # the widened experts are made again for the backward pass, not kept
            return checkpoint(compute, x, weights, use_reentrant=False, preserve_rng_state=False)
        return compute(x, weights)


EXPERT_STACKS = {"w_in": 2, "w_out": 1}
"""Matrices of an expert in each parameter of a MoE."""


def quantizable_matrices(model: Transformer) -> list[str]:
    """Parameters that are worth packing, by name: the matrices of all blocks, routers aside."""
    found = []
    for name, module in model.named_modules():
        if ".attention." in name or ".ffn" in name:
            found += [f"{name}.weight"] if isinstance(module, nn.Linear) else []
            found += [f"{name}.{leaf}" for leaf in EXPERT_STACKS] if isinstance(module, MoE) else []
    return found


def quantize_model(
    model: Transformer, quantization: QuantScheme, names: Collection[str], dtype: torch.dtype | None = None
) -> None:
    """Keep the named parameters packed, in place; a model on the meta device gets empty ones.

    names: as in state_dict, of linear layers and of stacks of experts, of which a layer needs both. dtype: of widened
    matrices where none is asked for; by default the parameter's.
    """
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        weight = getattr(module, leaf).detach()
        if isinstance(module, MoE):
            stack = weight.unflatten(1, (EXPERT_STACKS[leaf], -1))
            delattr(module, leaf)
            setattr(module, leaf, QuantizedWeight(quantization, stack, dtype or weight.dtype))
            module.products = QuantizedExperts()
        else:
            assert isinstance(module, nn.Linear), name
            parent, _, place = owner.rpartition(".")
            layer = QuantizedLinear(QuantizedWeight(quantization, weight, dtype or weight.dtype), module.bias)
            setattr(model.get_submodule(parent), place, layer)


def dequantize_model(model: M) -> M:
    """Widen everything that is packed, in place, to parameters; returns the model."""
    for name, quantized in quantized_weights(model).items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, MoE):
            wide = nn.Parameter(quantized.whole())
            delattr(module, leaf)
            setattr(module, leaf, wide)
            module.products = None
        else:
            assert isinstance(module, QuantizedLinear)
            parent, _, place = owner.rpartition(".")
            layer = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            layer.weight, layer.bias = nn.Parameter(quantized.whole()), module.bias
            setattr(model.get_submodule(parent), place, layer)
    return model


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """What is packed, by the name that the parameter has in a plain model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            owner, _, leaf = name.rpartition(".")
            found[f"{owner}.weight" if leaf == "quantized" else name] = module
    return found
