"""Copies of a model for computation: in a lower precision than the fp32 master weights, or quantized."""

import copy
from typing import Literal

import torch
from torch import nn

from thinkstack.models.lora import BASE_SCHEMES, adapters, merge_adapters, merged_tensors
from thinkstack.models.moe import MoE
from thinkstack.models.quantized import dequantize_model, quantizable_matrices, quantize_model, quantized_weights
from thinkstack.models.transformer import Transformer
from thinkstack.quant.int8 import Int8
from thinkstack.quant.scheme import QuantScheme

Quantization = Literal["none", "int8", "fp8", "nf4"]
"""Quantization of the matrices in inference; "none": the precision of the model."""
QUANT_SCHEMES: dict[str, QuantScheme] = {"int8": Int8(), **BASE_SCHEMES}


def cast_copy(model: Transformer, dtype: torch.dtype, always: bool = False) -> Transformer:
    """A copy with matrices in `dtype`, or the model itself if it has that dtype; norms, routers and biases stay fp32.

    always: copy even if the model has that dtype.
    """
    if dtype == next(model.parameters()).dtype and not always:
        return model
    copied = copy.deepcopy(model)
    _cast_matrices(copied, dtype)
    return copied


def _cast_matrices(model: Transformer, dtype: torch.dtype) -> None:
    routers = {id(module.router) for module in model.modules() if isinstance(module, MoE)}
    for parameter in model.parameters():
        if parameter.dim() > 1 and id(parameter) not in routers:
            parameter.data = parameter.data.to(dtype)


def inference_copy(model: Transformer, dtype: torch.dtype, quantization: Quantization = "none") -> Transformer:
    """`cast_copy` of the model with merged adapters; the merge is in the precision of the model, before the cast.

    quantization: unless "none", matrices and output head are quantized from the precision of the model; in this case
    the result is always a copy, and matmuls run in `dtype`.
    """
    plain = merge_adapters(model)
    if quantization == "none":
        return cast_copy(plain, dtype)
    return _quantized_copy(plain, dtype, QUANT_SCHEMES[quantization])


@torch.no_grad()
def _quantized_copy(model: Transformer, dtype: torch.dtype, quantization: QuantScheme) -> Transformer:
    """A copy with quantized matrices; a head that is tied to the embedding gets a separate parameter."""
    if quantized_weights(model):
        model = dequantize_model(copy.deepcopy(model))
    names = quantizable_matrices(model)
    shared = [model.get_parameter(name) for name in names]
    copied = copy.deepcopy(model, {id(weight): weight for weight in shared})  # quantized from the original, not copied
    quantize_model(copied, quantization, [*names, "head.weight"], dtype)
    _cast_matrices(copied, dtype)
    return copied


@torch.no_grad()
def update_copy(copied: nn.Module, model: nn.Module) -> None:
    """Update a copy created by `cast_copy` or `inference_copy` from the model."""
    if copied is model:
        return
    if adapters(model) and not adapters(copied):
        targets = dict((*copied.named_parameters(), *copied.named_buffers()))
        for name, value in merged_tensors(model):
            targets[name].copy_(value)
        return
    pairs = zip((*copied.parameters(), *copied.buffers()), (*model.parameters(), *model.buffers()), strict=True)
    for target, value in pairs:
        target.copy_(value)
