"""Quantization of a model's weights, for inference and as the frozen base of adapters.

`quantize_model` replaces the linear layers and the stacks of routed experts of a model by quantized modules in any
QuantScheme; `dequantize_model` reverts this. Gradients flow to the input; the weights have no gradient."""

from collections.abc import Collection
from typing import TypeVar

import torch
from torch import nn

from thinkstack.models.layers import QuantizedLinear, QuantizedWeight
from thinkstack.models.moe import MoE
from thinkstack.models.transformer import Transformer
from thinkstack.quant.scheme import QuantScheme

M = TypeVar("M", bound=Transformer)

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
