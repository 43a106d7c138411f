"""Working copies of a model in a lower precision: the weights that count stay fp32, the products run in bf16."""

import copy
from typing import Literal

import torch
from torch import nn

from thinkstack.models.lora import adapters, merged, plain_tensors
from thinkstack.models.moe import MoE
from thinkstack.models.transformer import Transformer

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def working_copy(model: Transformer, dtype: torch.dtype, always: bool = False) -> Transformer:
    """The model itself for its own dtype, else a copy with matrices in `dtype`; norms, routers and biases stay fp32.

    always: copy even for the model's own dtype.
    """
    if dtype == next(model.parameters()).dtype and not always:
        return model
    twin = copy.deepcopy(model)
    keep = {id(module.router) for module in twin.modules() if isinstance(module, MoE)}
    for parameter in twin.parameters():
        if parameter.dim() > 1 and id(parameter) not in keep:
            parameter.data = parameter.data.to(dtype)
    return twin


def inference_copy(model: Transformer, dtype: torch.dtype) -> Transformer:
    """`working_copy` without adapters: they are merged into a copy, so what they adapt is never rounded."""
    return working_copy(merged(model), dtype)


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
