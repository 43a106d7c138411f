"""Working copies of a model: in a lower precision, while the weights that count stay fp32, or in few bits."""

import copy
import functools
import logging
from typing import Literal

import torch
from torch import nn

from thinkstack.kernels import choice
from thinkstack.models.lora import BASES, adapters, merged, plain_tensors
from thinkstack.models.moe import MoE
from thinkstack.models.quantized import dequantize_model, quantizable_matrices, quantize_model, quantized_weights
from thinkstack.models.transformer import Transformer
from thinkstack.quant.int8 import Int8
from thinkstack.quant.scheme import QuantScheme

log = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
AskedPrecision = Literal["auto", "fp32", "bf16"]
"""auto: bf16 where the device multiplies it faster than fp32 (`resolve_precision`)."""
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
Quantization = Literal["plain", "int8", "fp8", "nf4"]
"""How matrices are kept for inference: in the model's precision, or packed."""
QUANT_SCHEMES: dict[str, QuantScheme] = {"int8": Int8(), **BASES}


def resolve_precision(asked: AskedPrecision, device: torch.device | str = "cpu") -> Precision:
    """What "auto" means on a device: on CUDA bf16, on a CPU what its instruction set and a measurement say.
    RolloutConfig for bf16 on a CPU that emulates it is warned about once."""
    if torch.device(device).type != "cpu":
        return "bf16" if asked == "auto" else asked
    if asked == "auto":
        return "bf16" if choice.choices().auto_dtype == "bf16" else "fp32"
    if asked == "bf16" and choice.choices().auto_dtype != "bf16":
        _warn_of_emulation(choice.choices().reason)
    return asked


@functools.cache
def _warn_of_emulation(reason: str) -> None:
    log.warning("dtype=bf16 is slow on this processor (%s); use dtype=auto or fp32", reason)


def working_copy(model: Transformer, dtype: torch.dtype, always: bool = False) -> Transformer:
    """The model itself for its own dtype, else a copy with matrices in `dtype`; norms, routers and biases stay fp32.

    always: copy even for the model's own dtype.
    """
    if dtype == next(model.parameters()).dtype and not always:
        return model
    twin = copy.deepcopy(model)
    _cast_matrices(twin, dtype)
    return twin


def _cast_matrices(model: Transformer, dtype: torch.dtype) -> None:
    keep = {id(module.router) for module in model.modules() if isinstance(module, MoE)}
    for parameter in model.parameters():
        if parameter.dim() > 1 and id(parameter) not in keep:
            parameter.data = parameter.data.to(dtype)


def inference_copy(model: Transformer, dtype: torch.dtype, weights: Quantization = "plain") -> Transformer:
    """`working_copy` without adapters: they are merged into a copy, so what they adapt is never rounded.

    weights: unless "plain", matrices and output head are packed, from the model's own numbers; the result is a copy
    whatever the dtype, and products run in that.
    """
    plain = merged(model)
    return working_copy(plain, dtype) if weights == "plain" else _quantized_copy(plain, dtype, QUANT_SCHEMES[weights])


@torch.no_grad()
def _quantized_copy(model: Transformer, dtype: torch.dtype, quantization: QuantScheme) -> Transformer:
    """A copy with packed matrices; where head and embedding are one parameter, the head becomes one of its own."""
    if quantized_weights(model):
        model = dequantize_model(copy.deepcopy(model))
    names = quantizable_matrices(model)
    packed_here = [model.get_parameter(name) for name in names]
    twin = copy.deepcopy(model, {id(weight): weight for weight in packed_here})  # not copied before they are packed
    quantize_model(twin, quantization, [*names, "head.weight"], dtype)
    _cast_matrices(twin, dtype)
    return twin


@torch.no_grad()
def refresh(twin: nn.Module, model: nn.Module) -> None:
    """Bring a working or inference copy up to date with the model it was made from."""
    if twin is model:
        return
    if adapters(model) and not adapters(twin):
        mine_by_name = dict((*twin.named_parameters(), *twin.named_buffers()))
        for name, value in plain_tensors(model):
            mine_by_name[name].copy_(value)
        return
    pairs = zip((*twin.parameters(), *twin.buffers()), (*model.parameters(), *model.buffers()), strict=True)
    for mine, theirs in pairs:
        mine.copy_(theirs)
