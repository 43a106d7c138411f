"""The fused pass of small models with latent attention: one kernel call for all layers, in fp32."""

# Shapes in this file: N tokens, D hidden size, K experts per token.

import ctypes

import torch
from torch import Tensor

from thinkstack.engine.fused import calls
from thinkstack.engine.fused.blocks import BLOCK_MODULES, FusedHead, refused_dtype, refused_module
from thinkstack.kernels.conditions import fp32_inference_on_cpu
from thinkstack.kernels.paging import Pages
from thinkstack.kernels.sizes import LANES
from thinkstack.models.attention import MLA
from thinkstack.models.block import Block
from thinkstack.models.config import MLAConfig
from thinkstack.models.layers import RopeCache
from thinkstack.models.moe import MoE
from thinkstack.models.mtp import MTPModule
from thinkstack.models.transformer import Transformer

MAX_HIDDEN = 1024
"""Maximum hidden size; in larger models the matmuls take longer than the overhead of calls."""


class FusedMLA(FusedHead):
    """The trunk of a small model with latent attention, dense or with experts, in fp32; batch-invariant."""

    max_num_tokens = 1 << 40

    def __init__(self, model: Transformer):
        """`refusal(model)` must be None."""
        super().__init__(model.head.weight)
        self.ignores_threads = self.prepacked_head is not None
        blocks = model.blocks()[: model.cfg.num_layers]
        self.module = next((module for module in model.mtp if isinstance(module, MTPModule)), None)
        own = [] if self.module is None else [self.module.block]
        self.model, self.weights = model, [_mla_weights(block) for block in (*blocks, *own)]
        widths = [{"I": 0 if held["w1"] is None else held["w1"].shape[0]} for held in self.weights]
        count = len(blocks)
        self.layers = calls.layer_array(calls.MLALayer, self.weights[:count], widths[:count])
        self.mtp_layers = calls.layer_array(calls.MLALayer, self.weights[count:], widths[count:])
        a, moe = model.cfg.attention, model.cfg.moe
        attention = blocks[0].attention
        assert isinstance(a, MLAConfig) and isinstance(attention, MLA)
        self.numbers: dict[str, float] = dict(H=a.num_heads, N=a.qk_nope_head_dim, R=a.qk_rope_head_dim, V=a.v_head_dim)
        self.numbers |= dict(C=a.kv_lora_rank, Q=a.q_lora_rank, interleaved=attention.interleaved)
        self.numbers |= dict(scale=attention.scale, eps=model.cfg.norm_eps)
        self.rope = RopeCache(a.qk_rope_head_dim, model.cfg.rope)
        self.num_routed = sum(isinstance(block.ffn, MoE) for block in blocks)
        self.experts_per_token = 0 if moe is None else moe.num_experts_per_tok
        if moe is not None:
            self.numbers |= dict(E=moe.num_experts, J=moe.moe_intermediate_size, K=moe.num_experts_per_tok)
            self.numbers |= dict(groups=moe.num_groups, top_groups=moe.top_groups, factor=moe.route_scale)
            self.numbers |= dict(scores_per_group=2 if moe.group_score == "top2" else 1)
            self.numbers |= dict(normalize=moe.norm_topk_prob, softmax=moe.scoring == "softmax")

    @staticmethod
    def refusal(model: Transformer, dtype: torch.dtype | None = None) -> str | None:
        """Why the pass does not run this model, MTP modules included; None if it does. dtype: as if the weights had
        this dtype."""
        if reason := refused_module(model.blocks(), BLOCK_MODULES):
            return reason
        for block in model.blocks():
            if not isinstance(block.attention, MLA):
                return "attention other than latent attention"
            if isinstance(block.ffn, MoE) and (reason := _experts_refusal(block.ffn)):
                return reason
        if model.cfg.hidden_size > MAX_HIDDEN:
            return f"a hidden size above {MAX_HIDDEN}"
        if reason := refused_dtype(model, model.blocks()):
            return reason
        like = model.embed.weight.new_empty(0, dtype=dtype)
        if not fp32_inference_on_cpu(like, "fused_mla"):
            return f"no kernels for inference in {like.dtype} on {like.device.type}"
        return None

    def hidden(self, ids: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> tuple[Tensor, Tensor | None]:
        """As in FusedPass."""
        x = self.model.embed(ids)
        chosen = self._forward(self.layers, self.num_routed, x, positions, pages, cache)
        return self.model.norm(x), chosen if self.num_routed else None

    def draft(self, hidden: Tensor, following: Tensor, positions: Tensor, pages: Pages, cache: Tensor) -> Tensor | None:
        """As in FusedPass."""
        if self.module is None:
            return None
        x = self.module.merged(hidden, self.model.embed(following))
        self._forward(self.mtp_layers, 1, x, positions, pages, cache[len(self.layers) :])
        states: Tensor = self.module.norm(x)
        return states

    def _forward(
        self,
        layers: ctypes.Array[ctypes.Structure],
        num_routed: int,
        x: Tensor,
        positions: Tensor,
        pages: Pages,
        cache: Tensor,
    ) -> Tensor:
        """Run x (N, D) through layers, in place. Returns experts (num_routed, N, K)."""
        rope = self.rope.lookup(positions)
        chosen = torch.empty(num_routed, len(x), self.experts_per_token, dtype=torch.int64)
        calls.run_pass("mla_pass", layers, self.numbers, x, rope, positions, pages, cache, chosen)
        return chosen


def _experts_refusal(ffn: MoE) -> str | None:
    """Why the pass does not compute these experts; None if it does."""
    if ffn.expert_module is not None:
        return type(ffn.expert_module).__name__
    sizes = ffn.w_in.shape[2], ffn.w_out.shape[2]
    return None if all(size % LANES == 0 for size in sizes) else f"sizes of experts that are not multiples of {LANES}"


def _mla_weights(block: Block) -> dict[str, Tensor | None]:
    """The weights of an MLALayer, by field."""
    a, ffn = block.attention, block.ffn
    assert isinstance(a, MLA)
    has_query_latent = a.shape.q_lora_rank > 0
    found: dict[str, Tensor | None] = {
        "attention_norm": block.attention_norm.weight,
        "wq_a": a.wq_a.weight if has_query_latent else None,
        "q_norm": a.q_norm.weight if has_query_latent else None,
        "wq_b": a.wq_b.weight if has_query_latent else a.wq.weight,
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
