"""One model over several processes for inference: heads, feed-forwards and experts shared out, sums over the ranks.

Applied to a built model from outside. Every rank has some heads of attention with their part of the output projection,
some columns of dense and shared feed-forwards, and some routed experts whole; embedding, head, latent projections,
router and norms are on every rank. Two sums a block bring the ranks together, so all of them hold the same hidden
states, draw the same tokens, and need no driver. Cuts as in DeepSeek-V3, inference/model.py, embedding and head aside.
"""

# Shapes in this file: N tokens, D hidden size, K experts per token, E experts of a rank, I intermediate size.

import atexit
import os
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from thinkstack.models.config import MLAConfig, ModelConfig
from thinkstack.models.layers import Linear
from thinkstack.models.moe import MoE, expert_mlp
from thinkstack.models.transformer import Transformer
from thinkstack.types import ConfigError

ROWS = re.compile(r"attention\.(wq|wk|wv|wq_b|wkv_b)\.|\.(w1|w3)\.")
COLUMNS = re.compile(r"attention\.wo\.weight|\.w2\.")
WHOLE_MLA = re.compile(r"attention\.(wq_a|wkv_a)\.")


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1

    def share(self, total: int) -> slice:
        """The part of `total` equal things that lies here."""
        size = total // self.count
        return slice(self.rank * size, (self.rank + 1) * size)


def init_ranks(device: str = "cpu") -> Ranks:
    """Join the processes that torchrun started; one rank alone outside of it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        atexit.register(distributed.destroy_process_group)  # else its threads may end the process with an abort
    return Ranks(distributed.get_rank(), distributed.get_world_size())


def local_config(cfg: ModelConfig, count: int) -> ModelConfig:
    """The model that each of `count` ranks builds: a part of the heads and of the dense feed-forward, no MTP modules.

    Raises ConfigError, naming it, for what does not divide.
    """
    a = cfg.attention
    parts = {"attention heads": a.num_heads, "intermediate_size": cfg.intermediate_size}
    if not isinstance(a, MLAConfig):
        parts["key/value heads"] = a.num_kv_heads
        if a.out_bias and count > 1:
            raise ConfigError("a bias on the output of attention would be added by every rank; use one process")
    if cfg.moe is not None:
        parts |= {"routed experts": cfg.moe.num_experts, "width of the shared experts": cfg.moe.shared_size}
    for what, total in parts.items():
        if total % count:
            raise ConfigError(f"{total} {what} do not divide among {count} processes; start a number that divides them")
    changed: dict[str, Any] = {"num_heads": a.num_heads // count}
    if not isinstance(a, MLAConfig):
        changed["num_kv_heads"] = a.num_kv_heads // count
    attention: Any = replace(a, **changed)
    return replace(cfg, attention=attention, intermediate_size=cfg.intermediate_size // count, mtp_layers=0)


def local_model(cfg: ModelConfig, ranks: Ranks) -> Transformer:
    """A model on the meta device with this rank's shapes, which sums over ranks when it is called. cfg: the whole."""
    with torch.device("meta"):
        model = Transformer(local_config(cfg, ranks.count))
        for module in model.modules():
            if isinstance(module, MoE):
                keep_experts(module, ranks)
    if ranks.count > 1:
        for block in model.blocks():
            block.attention.register_forward_hook(_summed)
            block.ffn.register_forward_hook(_summed)
    return model


def keep_experts(moe: MoE, ranks: Ranks) -> None:
    """Give `moe` room for this rank's routed experts and its part of the shared ones."""
    here = ranks.share(moe.cfg.num_experts)
    for name in ("w_in", "w_out"):
        setattr(moe, name, nn.Parameter(getattr(moe, name)[here].clone()))
    moe.products = LocalExperts(here.start)
    if moe.shared is not None:
        size = moe.cfg.shared_size // ranks.count
        for name in ("w1", "w3"):
            setattr(moe.shared, name, Linear(moe.shared.w1.in_features, size, bias=False))
        moe.shared.w2 = Linear(size, moe.shared.w2.out_features, bias=False)


class LocalExperts(nn.Module):
    """The routed experts of one rank: what the others compute is missing from the result."""

    def __init__(self, first: int):
        """first: number of the first expert that lies here."""
        super().__init__()
        self.first = first

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        """x (N, D), weights (N, K) and experts (N, K), numbered over all ranks; w_in (E, 2I, D), w_out (E, D, I)."""
        local = experts - self.first
        token, choice = ((local >= 0) & (local < w_in.shape[0])).nonzero(as_tuple=True)
        out = torch.zeros_like(x)
        if len(token):
            weight, expert = (values[token, choice].unsqueeze(1) for values in (weights, local))
            out.index_add_(0, token, expert_mlp(x[token], weight, expert, w_in, w_out))
        return out


def _summed(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A forward hook: the sum of a sublayer's output over all ranks, in fp32."""
    if isinstance(output, tuple):
        return (_summed(module, inputs, output[0]), *output[1:])
    total = output.float()
    distributed.all_reduce(total)
    return total.to(output.dtype)


def part_here(name: str, whole: Tensor, cfg: ModelConfig, ranks: Ranks) -> Tensor:
    """This rank's part of a parameter, by its name in the whole model; experts are told apart by the caller."""
    if WHOLE_MLA.search(name):
        return whole
    if ROWS.search(name):
        return whole[ranks.share(whole.shape[0])]
    return whole[:, ranks.share(whole.shape[1])] if COLUMNS.search(name) else whole


def broadcast_text(text: str | None, ranks: Ranks) -> str | None:
    """What rank 0 says, on every rank."""
    if ranks.count == 1:
        return text
    box = [text]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
