"""Tensor- and expert-parallel inference: one model sharded across several processes.

The sharding is applied to an existing model. Each rank has a part of the attention heads with the corresponding part of
the output projection, a part of the columns of dense and shared feed-forwards, and a part of the routed experts;
embedding, head, latent projections, router and norms are replicated. Two all-reduces per block give all ranks the same
hidden states, so that all ranks sample the same tokens without a driver process. The sharding is the same as in
DeepSeek-V3, inference/model.py, except for embedding and head.
"""

# Shapes in this file: N tokens, D hidden size, K experts per token, E experts of this rank, I intermediate size.

import atexit
import os
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from thinkstack.kernels import ops
from thinkstack.models.config import MLAConfig, ModelConfig
from thinkstack.models.layers import Linear
from thinkstack.models.moe import MoE
from thinkstack.models.transformer import Transformer
from thinkstack.types import ConfigError

ROWS = re.compile(r"attention\.(wq|wk|wv|wq_b|wkv_b)\.|\.(w1|w3)\.")
COLUMNS = re.compile(r"attention\.wo\.weight|\.w2\.")
REPLICATED_MLA = re.compile(r"attention\.(wq_a|wkv_a)\.")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of processes."""

    rank: int = 0
    count: int = 1

    def share(self, total: int) -> slice:
        """The indices of the part of `total` items that belongs to this rank."""
        size = total // self.count
        return slice(self.rank * size, (self.rank + 1) * size)


def init_ranks(device: str = "cpu") -> Ranks:
    """Join the process group of torchrun; without torchrun, return a single rank."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(
            distributed.destroy_process_group
        )  # otherwise threads of the process group may abort the process at exit
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def local_config(cfg: ModelConfig, count: int) -> ModelConfig:
    """The configuration of each rank's shard for `count` ranks: a part of heads and feed-forward columns, no MTP.

    Raises ConfigError for a size that is not divisible by `count`.
    """
    a = cfg.attention
    parts = {"attention heads": a.num_heads, "intermediate_size": cfg.intermediate_size}
    if not isinstance(a, MLAConfig):
        parts["key/value heads"] = a.num_kv_heads
        if a.out_bias and count > 1:
            raise ConfigError("every rank would add the output bias of attention; use one process for this model")
    if cfg.moe is not None:
        parts |= {"routed experts": cfg.moe.num_experts, "width of the shared experts": cfg.moe.shared_size}
    for what, total in parts.items():
        if total % count:
            raise ConfigError(
                f"{what}: {total} is not divisible by {count} processes; use a number of processes that divides {total}"
            )
    changed: dict[str, Any] = {"num_heads": a.num_heads // count}
    if not isinstance(a, MLAConfig):
        changed["num_kv_heads"] = a.num_kv_heads // count
    attention: Any = replace(a, **changed)
    return replace(cfg, attention=attention, intermediate_size=cfg.intermediate_size // count, mtp_layers=0)


def local_model(cfg: ModelConfig, ranks: Ranks) -> Transformer:
    """A model on the meta device with the shapes of this rank and all-reduces in the forward pass.

    cfg: configuration of the complete model.
    """
    with torch.device("meta"):
        model = Transformer(local_config(cfg, ranks.count))
        for module in model.modules():
            if isinstance(module, MoE):
                shard_experts(module, ranks)
    if ranks.count > 1:
        for block in model.blocks():
            block.attention.register_forward_hook(_all_reduced)
            block.ffn.register_forward_hook(_all_reduced)
    return model


def shard_experts(moe: MoE, ranks: Ranks) -> None:
    """Reduce the parameters of `moe` to the routed experts of this rank and its part of the shared experts."""
    local = ranks.share(moe.cfg.num_experts)
    for name in ("w_in", "w_out"):
        setattr(moe, name, nn.Parameter(getattr(moe, name)[local].clone()))
    moe.expert_module = LocalExperts(local.start)
    if moe.shared is not None:
        size = moe.cfg.shared_size // ranks.count
        for name in ("w1", "w3"):
            setattr(moe.shared, name, Linear(moe.shared.w1.in_features, size, bias=False))
        moe.shared.w2 = Linear(size, moe.shared.w2.out_features, bias=False)


class LocalExperts(nn.Module):
    """The routed experts of one rank; the result does not include the contributions of other ranks."""

    def __init__(self, first: int):
        """first: index of the first expert of this rank."""
        super().__init__()
        self.first = first

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        """x (N, D), weights (N, K) and experts (N, K), numbered over all ranks; w_in (E, 2I, D), w_out (E, D, I)."""
        local = experts - self.first
        token, choice = ((local >= 0) & (local < w_in.shape[0])).nonzero(as_tuple=True)
        out = torch.zeros_like(x)
        if len(token):
            weight, expert = (values[token, choice].unsqueeze(1) for values in (weights, local))
            out.index_add_(0, token, ops.experts(x[token], weight, expert, w_in, w_out))
        return out


def _all_reduced(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook that sums the output of a sublayer over all ranks, in fp32."""
    if isinstance(output, tuple):
        return (_all_reduced(module, inputs, output[0]), *output[1:])
    total = output.float()
    distributed.all_reduce(total)
    return total.to(output.dtype)


def local_part(name: str, full: Tensor, cfg: ModelConfig, ranks: Ranks) -> Tensor:
    """This rank's part of the parameter `name` of the complete model; the caller selects the experts."""
    if REPLICATED_MLA.search(name):
        return full
    if ROWS.search(name):
        return full[ranks.share(full.shape[0])]
    return full[:, ranks.share(full.shape[1])] if COLUMNS.search(name) else full


def broadcast_text(text: str | None, ranks: Ranks) -> str | None:
    """Broadcast the text of rank 0 to all ranks."""
    if ranks.count == 1:
        return text
    box = [text]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
