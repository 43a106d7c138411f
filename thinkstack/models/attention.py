"""Multi-head latent attention (MLA) and grouped-query attention (GQA) with a common interface.

Without a cache (training), the tokens of a row attend to each other. With a cache (the engine, prefill included),
entries of new tokens are first written to the cache; then the tokens attend to the cache. MLA has two equivalent
forms: without a cache, latents are expanded to keys and values per head; with a cache, the expansion is absorbed into
the query, because expanding the entire context for each new token would cost more than the rest of the model.
"""

# Shapes in this file: B rows, T new tokens, S tokens attended to, D hidden size, H heads, C kv_lora_rank,
# R rotated width, N = qk_nope_head_dim, V = v_head_dim, W = cache_width, G key/value heads, Q = H / G, K key width.

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from thinkstack.kernels import ops
from thinkstack.kernels.masks import PackedMask
from thinkstack.kernels.paging import KVLayout, Pages
from thinkstack.models.config import GQAConfig, MLAConfig, ModelConfig
from thinkstack.models.layers import Linear, RMSNorm


class LayerCache(Protocol):
    """The interface of the KV cache for an attention layer; every row of the pass is one new token."""

    def extend(self, layer: int, entries: Tensor) -> Pages:
        """Write the entries (N, 1, W) of the new tokens; returns the pages of their context, new entries included."""


@dataclass(kw_only=True)
class AttentionContext:
    """The common inputs of all attention layers in a forward pass."""

    rope: Tensor
    """Rotations of the new tokens, (B or 1, T, R / 2) complex64."""
    mask: PackedMask | None = None
    """In training: which tokens of a row attend to each other."""
    cache: LayerCache | None = None
    """The KV cache of the engine."""
    positions: Tensor | None = None
    """With a cache: the position of each new token in its sequence, (N, 1) int64."""


class Attention(nn.Module):
    """The common part of MLA and GQA: attention of projected queries."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.interleaved, self.scale = layer, cfg.rope.interleaved, cfg.softmax_scale

    def attend_packed(
        self, q: Tensor, kv: Tensor, k_shared: Tensor | None, layout: KVLayout, ctx: AttentionContext
    ) -> Tensor:
        """Attention of the tokens of packed rows to each other.

        q: (B, T, H, K), not rotated. kv: (B, T, ...) entries in `layout`, not rotated. k_shared: (B, T, R), the part at
        the end of every key that heads share, or None. Returns (B, T, H, V).
        """
        assert ctx.mask is not None
        return ops.attend(q, kv, k_shared, ctx.rope, ctx.mask, layout, self.scale, self.interleaved)

    def attend_paged(self, q: Tensor, pages: Pages, layout: KVLayout, ctx: AttentionContext) -> Tensor:
        """Attention of new tokens q (N, 1, H, K), rotated, to their cached contexts. Returns (N, 1, H, V)."""
        assert ctx.positions is not None
        grouped, last = q.squeeze(1).unflatten(1, (layout.groups, -1)), ctx.positions.squeeze(1)
        return ops.paged_attend(grouped, pages, last, layout, self.scale).flatten(1, 2).unsqueeze(1)


class MLA(Attention):
    """Multi-head latent attention (V2 report, section 2.1); names as in DeepSeek-V3 inference/model.py."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer)
        a = cfg.attention
        assert isinstance(a, MLAConfig)
        self.shape = a
        per_head = a.qk_nope_head_dim + a.v_head_dim
        nope = a.qk_nope_head_dim
        self.expanded_layout = KVLayout(a.num_heads, nope, per_head, nope, per_head, a.v_head_dim)
        self.absorbed_layout = KVLayout(1, a.cache_width, 0, 0, 0, a.kv_lora_rank)
        if a.q_lora_rank:
            self.wq_a = Linear(cfg.hidden_size, a.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(a.q_lora_rank, cfg.norm_eps)
            self.wq_b = Linear(a.q_lora_rank, a.num_heads * a.qk_head_dim, bias=False)
        else:
            self.wq = Linear(cfg.hidden_size, a.num_heads * a.qk_head_dim, bias=False)
        self.wkv_a = Linear(cfg.hidden_size, a.cache_width, bias=False)
        self.kv_norm = RMSNorm(a.kv_lora_rank, cfg.norm_eps)
        self.wkv_b = Linear(a.kv_lora_rank, a.num_heads * per_head, bias=False)
        self.wo = Linear(a.num_heads * a.v_head_dim, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """x: (B, T, D), normed. Returns (B, T, D)."""
        a = self.shape
        q = self.wq_b(self.q_norm(self.wq_a(x))) if a.q_lora_rank else self.wq(x)
        q = q.unflatten(-1, (a.num_heads, -1))  # (B, T, H, N + R)
        latent, k_rope = self.wkv_a(x).split([a.kv_lora_rank, a.qk_rope_head_dim], -1)
        latent, context = self.kv_norm(latent), None
        if ctx.cache is not None:
            rotated = ops.rotate(k_rope.unsqueeze(2), ctx.rope, self.interleaved).squeeze(2)
            context = ctx.cache.extend(self.layer, torch.cat((latent, rotated), -1))
        if context is None:
            heads = self.attend_packed(q, self.wkv_b(latent), k_rope, self.expanded_layout, ctx)
        else:
            heads = self.attend_absorbed(q, context, ctx)
        return self.wo(heads.flatten(2))

    def attend_absorbed(self, q: Tensor, pages: Pages, ctx: AttentionContext) -> Tensor:
        """Attention of q (B, 1, H, N + R) over cached latents, without expanding them to keys or values.

        The query is multiplied with the key half of wkv_b, the output with the value half. Returns (B, 1, H, V).
        """
        a = self.shape
        w_uk, w_uv = self.wkv_b.weight.unflatten(0, (a.num_heads, -1)).split([a.qk_nope_head_dim, a.v_head_dim], 1)
        q_nope, q_rope = q.split([a.qk_nope_head_dim, a.qk_rope_head_dim], -1)
        q_latent = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), w_uk)  # (H, B*T, C)
        q_latent = q_latent.transpose(0, 1).unflatten(0, q.shape[:2])
        q = torch.cat((q_latent, ops.rotate(q_rope, ctx.rope, self.interleaved)), -1)  # (B, T, H, W)
        out = self.attend_paged(q, pages, self.absorbed_layout, ctx).flatten(0, 1).transpose(0, 1)  # (H, B*T, C)
        return torch.bmm(out, w_uv.transpose(1, 2)).transpose(0, 1).unflatten(0, q.shape[:2])


class GQA(Attention):
    """Grouped-query attention (arXiv:2305.13245) of Llama; optionally biases as in Qwen2, head norms as in Qwen3."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer)
        a = cfg.attention
        assert isinstance(a, GQAConfig)
        self.shape = a
        width = a.num_kv_heads * a.head_dim
        self.layout = KVLayout(a.num_kv_heads, a.head_dim, a.head_dim, width, a.head_dim, a.head_dim)
        self.wq = Linear(cfg.hidden_size, a.num_heads * a.head_dim, bias=a.qkv_bias)
        self.wk = Linear(cfg.hidden_size, width, bias=a.qkv_bias)
        self.wv = Linear(cfg.hidden_size, width, bias=a.qkv_bias)
        self.wo = Linear(a.num_heads * a.head_dim, cfg.hidden_size, bias=a.out_bias)
        self.q_norm = RMSNorm(a.head_dim, cfg.norm_eps) if a.qk_norm else None
        self.k_norm = RMSNorm(a.head_dim, cfg.norm_eps) if a.qk_norm else None

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """x: (B, T, D), normed. Returns (B, T, D)."""
        q = project_heads(x, self.wq, self.q_norm, self.shape.num_heads)
        k, v = project_heads(x, self.wk, self.k_norm, self.shape.num_kv_heads), self.wv(x)
        context = None
        if ctx.cache is not None:
            rotated = ops.rotate(k, ctx.rope, self.interleaved).flatten(2)
            context = ctx.cache.extend(self.layer, torch.cat((rotated, v), -1))
        if context is None:
            heads = self.attend_packed(q, torch.cat((k.flatten(2), v), -1), None, self.layout, ctx)
        else:
            heads = self.attend_paged(ops.rotate(q, ctx.rope, self.interleaved), context, self.layout, ctx)
        return self.wo(heads.flatten(2))


def project_heads(x: Tensor, linear: nn.Linear, norm: RMSNorm | None, num_heads: int) -> Tensor:
    """Project x (B, T, D), split it into heads (B, T, num_heads, head_dim), and apply `norm` to each head if given."""
    heads = linear(x).unflatten(-1, (num_heads, -1))
    return heads if norm is None else norm(heads)
