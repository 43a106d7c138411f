"""Load this rank's shard of a checkpoint, one tensor at a time."""

from dataclasses import replace
from pathlib import Path

import torch

from thinkstack.checkpoint.hf.tensors import EXPERT_STACKS, allocate, tensor_entries
from thinkstack.checkpoint.model import open_source
from thinkstack.models.moe import MoE
from thinkstack.models.transformer import Transformer
from thinkstack.parallel.inference import Ranks, local_model, local_part


@torch.no_grad()
def load_shard(source: str | Path, ranks: Ranks, dtype: torch.dtype = torch.float32) -> Transformer:
    """This rank's shard of the model at `source`, in `dtype`, on the CPU (see parallel/inference.py).

    Raises ConfigError like load_model, and for a model whose sizes are not divisible by the number of ranks.
    """
    opened = open_source(source)
    cfg = replace(opened.cfg, mtp_layers=0)
    model = local_model(cfg, ranks)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    allocate(model)
    if cfg.tie_embeddings:
        model.head.weight = model.embed.weight
    for module in model.modules():
        if isinstance(module, MoE):
            module.bias.zero_()
    state = model.state_dict()
    experts = ranks.share(cfg.moe.num_experts) if cfg.moe is not None else slice(0)
    for item in tensor_entries(cfg):
        if item.is_copy or item.name not in opened.tensors:
            continue
        target = state[item.source]
        if item.part:
            expert, block = item.part
            if not experts.start <= expert < experts.stop:
                continue
            stacked = target.unflatten(1, (EXPERT_STACKS[item.source.rpartition(".")[2]], -1))
            stacked[expert - experts.start, block].copy_(opened.tensors[item.name]())
        else:
            target.copy_(local_part(item.source, opened.tensors[item.name](), cfg, ranks))
    return model
