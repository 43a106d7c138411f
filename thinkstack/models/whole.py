"""All blocks of a model in one call of a kernel, where calling operators would take longer than their work: models with
few features in fp32, and any dense model that reads a few tokens at a time, in bf16 with matrices in bf16 or int8.
"""

# Shapes in this file: N tokens, D hidden size, L blocks, M blocks with experts, K experts per token, W entry width.

import copy
import ctypes
from typing import Protocol

import torch
from torch import Tensor, nn

from thinkstack.models import kernels
from thinkstack.models.attention import GQA, MLA
from thinkstack.models.block import Block
from thinkstack.models.config import MLAConfig
from thinkstack.models.layers import Projection, RMSNorm, SwiGLU, rope_table
from thinkstack.models.moe import MoE
from thinkstack.models.mtp import MTPModule
from thinkstack.models.pages import Pages
from thinkstack.models.quant import Packed, PackedLinear
from thinkstack.models.transformer import Transformer

PLAIN = {Block, GQA, MLA, SwiGLU, MoE, RMSNorm, Projection, nn.ModuleDict}
"""What a block consists of as it was built."""
PACKED = PLAIN - {Projection, MoE} | {PackedLinear, Packed}
"""What a dense one consists of whose matrices are packed."""
Weights = dict[str, Tensor | None]


class WholeModel(Protocol):
    """The trunk of a model over a cache. Weights may change in place, not be replaced."""

    most_tokens: int
    """Tokens of a call."""

    def hidden(self, ids: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `Transformer.trunk` makes of tokens ids (N,) at positions (N,) of their sequences.

        pages: of the N tokens, in the first layer. cache: (L, blocks, P, W), of all layers; written to. Returns (hidden
        states (N, D), normed; experts (M, N, K) int64 or None).
        """

    def draft(self, hidden: Tensor, following: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> Tensor | None:
        """What `Transformer.draft` makes of (N, D), (N,) and (N,): states (N, D), or None where none can."""


@torch.no_grad()
def whole_model(model: Transformer) -> WholeModel | None:
    """A kernel for the whole of `model`; None where there is none for it."""
    blocks = [block for block in model.layers if isinstance(block, Block)]
    if any(_has_hooks(module) for module in blocks):  # shares of ranks
        return None
    if all(_is_dense(block) for block in blocks):
        return FewTokens(model, blocks)
    return SmallLatent(model, blocks) if _is_small_latent(model, model.embed.weight) else None


@torch.no_grad()
def widened(model: Transformer) -> Transformer:
    """A model in bf16, or, where one kernel then takes the whole of it, a copy with the same numbers in fp32: at such
    sizes the calls are what takes the time, not the bytes. It is more exact than bf16, not as exact as fp32."""
    weight = model.embed.weight
    if weight.dtype != torch.bfloat16 or not _is_small_latent(model, weight.new_empty(0, dtype=torch.float32)):
        return model
    return copy.deepcopy(model).float()


class FewTokens:
    """Grouped queries and dense feed-forwards in bf16: every weight is read once, as it is stored."""

    most_tokens = kernels.FEW

    def __init__(self, model: Transformer, blocks: list[Block]):
        self.model, self.kept = model, [_dense_weights(block) for block in blocks]
        self.layers = kernels.rows_of(kernels.BlockWeights, self.kept)
        attention, ffn = blocks[0].attention, blocks[0].ffn
        assert isinstance(attention, GQA) and isinstance(ffn, SwiGLU)
        shape = attention.shape
        self.sizes = {"H": shape.num_heads, "G": shape.num_kv_heads, "W": shape.head_dim, "I": ffn.w1.out_features}
        self.sizes |= {"interleaved": int(attention.interleaved), "packed": int("sq" in self.kept[0])}
        self.scales = {"scale": attention.scale, "eps": model.cfg.norm_eps}

    def hidden(self, ids: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> tuple[Tensor, Tensor | None]:
        """As WholeModel says."""
        cfg, x = self.model.cfg, self.model.embed(ids)
        rope = rope_table(positions.unsqueeze(1), cfg.attention.rope_dim, cfg.rope)
        kernels.block_steps(x, self.layers, self.sizes, rope, positions, pages, cache, self.scales)
        return self.model.norm(x), None

    def draft(self, hidden: Tensor, following: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> Tensor | None:
        """As WholeModel says."""
        return None


class SmallLatent:
    """Latent attention, experts or not, in fp32: what becomes of a token does not depend on how many there are."""

    most_tokens = 1 << 40

    def __init__(self, model: Transformer, blocks: list[Block]):
        self.module = next((module for module in model.mtp if isinstance(module, MTPModule)), None)
        if self.module is not None and not _is_latent(self.module.block):
            self.module = None
        own = [] if self.module is None else [self.module.block]
        self.model, self.kept = model, [_latent_weights(block) for block in (*blocks, *own)]
        widths = [{"I": 0 if held["w1"] is None else held["w1"].shape[0]} for held in self.kept]
        count = len(blocks)
        self.layers = kernels.rows_of(kernels.LatentLayer, self.kept[:count], widths[:count])
        self.ahead = kernels.rows_of(kernels.LatentLayer, self.kept[count:], widths[count:])
        a, moe = model.cfg.attention, model.cfg.moe
        attention = blocks[0].attention
        assert isinstance(a, MLAConfig) and isinstance(attention, MLA)
        self.sizes = dict(H=a.num_heads, N=a.qk_nope_head_dim, R=a.qk_rope_head_dim, V=a.v_head_dim, C=a.kv_lora_rank)
        self.sizes |= {"Q": a.q_lora_rank, "interleaved": int(attention.interleaved)}
        self.scales = {"scale": attention.scale, "eps": model.cfg.norm_eps}
        self.num_routed = sum(isinstance(block.ffn, MoE) for block in blocks)
        if moe is not None:
            self.sizes |= dict(E=moe.num_experts, J=moe.expert_size, K=moe.top_k, groups=moe.num_groups)
            self.sizes |= dict(top_groups=moe.top_groups, best=2 if moe.group_score == "top2" else 1)
            self.sizes |= dict(normalise=int(moe.normalise_weights), softmax=int(moe.scoring == "softmax"))
            self.scales["factor"] = moe.route_scale

    def hidden(self, ids: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> tuple[Tensor, Tensor | None]:
        """As WholeModel says."""
        x = self.model.embed(ids)
        chosen = self._through(self.layers, self.num_routed, x, positions, pages, cache)
        return self.model.norm(x), chosen if self.num_routed else None

    def draft(self, hidden: Tensor, following: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> Tensor | None:
        """As WholeModel says."""
        if self.module is None:
            return None
        x = self.module.merged(hidden, self.model.embed(following))
        self._through(self.ahead, 1, x, positions, pages, cache[len(self.layers) :])
        states: Tensor = self.module.norm(x)
        return states

    def _through(
        self,
        layers: ctypes.Array[ctypes.Structure],
        num_routed: int,
        x: Tensor,
        positions: Tensor,
        pages: Pages,
        cache: Tensor,
    ) -> Tensor:
        """Take x (N, D) through layers, in place. Returns experts (num_routed, N, K)."""
        cfg = self.model.cfg
        rope = rope_table(positions.unsqueeze(1), cfg.attention.rope_dim, cfg.rope)
        chosen = torch.empty(num_routed, len(x), self.sizes.get("K", 0), dtype=torch.int64)
        kernels.latent_model(x, layers, self.sizes, rope, positions, pages, cache, self.scales, chosen)
        return chosen


def _has_hooks(module: nn.Module) -> bool:
    return any(part._forward_hooks for part in module.modules())


def _consists_of(block: Block, kinds: set[type[nn.Module]]) -> bool:
    return all(type(part) in kinds for part in block.modules())


def _is_small_latent(model: Transformer, like: Tensor) -> bool:
    """Whether SmallLatent takes a model of numbers like `like`; shares of ranks it does not."""
    blocks = [block for block in model.layers if isinstance(block, Block)]
    if any(_has_hooks(block) for block in blocks) or not all(_is_latent(block) for block in blocks):
        return False
    return kernels.takes_steps(like, model.cfg.hidden_size)


def _is_dense(block: Block) -> bool:
    """Whether a block is one of FewTokens', with matrices of widths that it takes."""
    if not isinstance(block.attention, GQA) or not isinstance(block.ffn, SwiGLU):
        return False
    if _consists_of(block, PLAIN):
        weights = [part.weight for part in block.modules() if isinstance(part, Projection)]
        return kernels.takes_few(weights[0].new_empty(1, kernels.LANES), *weights)
    layers = [part for part in block.modules() if isinstance(part, PackedLinear)]
    packed = [layer.in_int8() for layer in layers]
    if not _consists_of(block, PACKED) or None in packed:
        return False
    codes = [parts["codes"] for parts in packed if parts is not None]
    return kernels.takes_few(codes[0].new_empty(1, kernels.LANES, dtype=layers[0].packed.dtype), *codes)


def _is_latent(block: Block) -> bool:
    """Whether a block is one of SmallLatent's."""
    ffn = block.ffn
    if not _consists_of(block, PLAIN) or not isinstance(block.attention, MLA):
        return False
    if not isinstance(ffn, MoE):
        return True
    sizes = (ffn.w_in.shape[2], ffn.w_out.shape[2])
    return ffn.products is None and not ffn.adapters and all(size % kernels.LANES == 0 for size in sizes)


def _dense_weights(block: Block) -> Weights:
    """What BlockWeights points to; vectors that are fp32 already are the model's own."""
    a, ffn = block.attention, block.ffn
    assert isinstance(a, GQA) and isinstance(ffn, SwiGLU)
    found: Weights = {}
    for owner, names in ((a, ("wq", "wk", "wv", "wo")), (ffn, ("w1", "w2", "w3"))):
        for name in names:
            layer = getattr(owner, name)
            parts = layer.in_int8() if isinstance(layer, PackedLinear) else None
            if parts is None:
                found[name] = layer.weight
            else:
                found |= {name: parts["codes"], f"s{name[1]}": parts["scale"]}
    vectors = {
        "attention_norm": block.attention_norm.weight,
        "ffn_norm": block.ffn_norm.weight,
        "q_norm": None if a.q_norm is None else a.q_norm.weight,
        "k_norm": None if a.k_norm is None else a.k_norm.weight,
        **{"bq": a.wq.bias, "bk": a.wk.bias, "bv": a.wv.bias, "bo": a.wo.bias},
    }
    return found | {name: None if vector is None else vector.detach().float() for name, vector in vectors.items()}


def _latent_weights(block: Block) -> Weights:
    """What LatentLayer points to."""
    a, ffn = block.attention, block.ffn
    assert isinstance(a, MLA)
    direct = not a.shape.q_lora_rank
    found: Weights = {
        "attention_norm": block.attention_norm.weight,
        "wq_a": None if direct else a.wq_a.weight,
        "q_norm": None if direct else a.q_norm.weight,
        "wq_b": a.wq.weight if direct else a.wq_b.weight,
        "wkv_a": a.wkv_a.weight,
        "kv_norm": a.kv_norm.weight,
        "wkv_b": a.wkv_b.weight,
        "wo": a.wo.weight,
        "ffn_norm": block.ffn_norm.weight,
    }
    dense = ffn.shared if isinstance(ffn, MoE) else ffn
    for name in ("w1", "w2", "w3"):
        found[name] = None if dense is None else getattr(dense, name).weight
    for name in ("router", "bias", "w_in", "w_out"):
        found[name] = getattr(ffn, name) if isinstance(ffn, MoE) else None
    return found
