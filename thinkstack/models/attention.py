"""Attention of the family: multi-head latent attention (MLA) and grouped-query attention (GQA).

Both answer to one interface. `entries` makes what the cache holds of new tokens; `attend` reads entries. Without a
cache the tokens attend among themselves (training); with one, the new entries are handed to it and all it holds is
read back. MLA reads its latents in two ways that give the same numbers: expanded to keys and values per head
(training, where every latent is used once per query of its own row), or absorbed into the query (decoding, where
expanding the whole context for each new token would cost more than the model).
"""

# Shapes in this file: B rows, T new tokens, S tokens attended to, D hidden size, H heads, C kv_lora_rank,
# R rotated width, N = qk_nope_head_dim, V = v_head_dim, W = cache_width.

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinkstack.models.config import GQAConfig, MLAConfig, ModelConfig
from thinkstack.models.layers import RMSNorm, rotate


class LayerCache(Protocol):
    """What the attention of one layer needs of a cache."""

    def extend(self, layer: int, entries: Tensor) -> Tensor:
        """Keep entries (B, T, W) of the new tokens; return those of all tokens attended to, (B, S, W)."""


@dataclass(frozen=True, kw_only=True)
class AttentionContext:
    """What every attention layer of one forward pass shares."""

    rope: Tensor
    """Rotations of the new tokens, (B, T, R / 2) complex64."""
    mask: Tensor
    """Added to the scores, (B or 1, 1, T, S) in the model's dtype: 0 = open, -inf = closed."""
    cache: LayerCache | None = None
    """Where the context of a generation lives; None in training."""


def causal_mask(length: int, document_ids: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask (B or 1, 1, T, T): each token sees itself and earlier tokens of its own document.

    document_ids: (B, T) int64 or None for one document a row.
    """
    visible = torch.ones(1, length, length, dtype=torch.bool, device=device).tril()
    if document_ids is not None:
        visible = visible & (document_ids[:, :, None] == document_ids[:, None, :])
    closed = torch.zeros((), dtype=dtype, device=device).new_full((), -torch.inf)
    return torch.where(visible, closed.new_zeros(()), closed).unsqueeze(1)


def weighted_values(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention of query (B, H, T, K), already scaled, key (B, H, S, K), value (B, H, S, V) to (B, H, T, V).

    Plain matrix products: for the short rows of this package they beat torch's fused CPU kernels in the backward pass,
    and key and value heads may differ in width.
    """
    scores = query @ key.transpose(-1, -2)  # (B, H, T, S)
    return torch.softmax(scores + mask, dim=-1) @ value


class MLA(nn.Module):
    """Multi-head latent attention (V2 report, section 2.1; names as in DeepSeek-V3 inference/model.py)."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        a = cfg.attention
        assert isinstance(a, MLAConfig)
        self.shape, self.layer = a, layer
        self.interleaved, self.scale = cfg.rope.interleaved, cfg.softmax_scale
        if a.q_lora_rank:
            self.wq_a = nn.Linear(cfg.hidden_size, a.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(a.q_lora_rank, cfg.norm_eps)
            self.wq_b = nn.Linear(a.q_lora_rank, a.num_heads * a.qk_head_dim, bias=False)
        else:
            self.wq = nn.Linear(cfg.hidden_size, a.num_heads * a.qk_head_dim, bias=False)
        self.wkv_a = nn.Linear(cfg.hidden_size, a.cache_width, bias=False)
        self.kv_norm = RMSNorm(a.kv_lora_rank, cfg.norm_eps)
        self.wkv_b = nn.Linear(a.kv_lora_rank, a.num_heads * (a.qk_nope_head_dim + a.v_head_dim), bias=False)
        self.wo = nn.Linear(a.num_heads * a.v_head_dim, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """x: (B, T, D), normed. Returns (B, T, D)."""
        q = self.wq_b(self.q_norm(self.wq_a(x))) if self.shape.q_lora_rank else self.wq(x)
        q = (q * self.scale).unflatten(-1, (self.shape.num_heads, -1))  # (B, T, H, N + R)
        q_nope, q_rope = q.split([self.shape.qk_nope_head_dim, self.shape.qk_rope_head_dim], -1)
        q_rope = rotate(q_rope, ctx.rope, self.interleaved)
        entries = self.entries(x, ctx.rope)
        if ctx.cache is None:
            heads = self.attend_expanded(q_nope, q_rope, entries, ctx.mask)
        else:
            heads = self.attend_absorbed(q_nope, q_rope, ctx.cache.extend(self.layer, entries), ctx.mask)
        return self.wo(heads.flatten(2))

    def entries(self, x: Tensor, rope: Tensor) -> Tensor:
        """What the cache keeps of x (B, T, D): the normed latent and the one rotated key, (B, T, W = C + R)."""
        latent, k_rope = self.wkv_a(x).split([self.shape.kv_lora_rank, self.shape.qk_rope_head_dim], -1)
        k_rope = rotate(k_rope.unsqueeze(2), rope, self.interleaved).squeeze(2)
        return torch.cat((self.kv_norm(latent), k_rope), -1)

    def attend_expanded(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, mask: Tensor) -> Tensor:
        """q_nope (B, T, H, N), q_rope (B, T, H, R), entries (B, S, W). Returns (B, T, H, V)."""
        a = self.shape
        latent, k_rope = entries.split([a.kv_lora_rank, a.qk_rope_head_dim], -1)
        kv = self.wkv_b(latent).unflatten(-1, (a.num_heads, -1)).transpose(1, 2)  # (B, H, S, N + V)
        k_nope, v = kv.split([a.qk_nope_head_dim, a.v_head_dim], -1)
        k_rope = k_rope.unsqueeze(1).expand(-1, a.num_heads, -1, -1)  # (B, H, S, R)
        q = torch.cat((q_nope.transpose(1, 2), q_rope.transpose(1, 2)), -1)  # (B, H, T, N + R)
        k = torch.cat((k_nope, k_rope), -1)
        return weighted_values(q, k, v, mask).transpose(1, 2)

    def attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor, mask: Tensor) -> Tensor:
        """As attend_expanded, without ever making keys or values: wkv_b's halves move to the query and the output."""
        a = self.shape
        w = self.wkv_b.weight.unflatten(0, (a.num_heads, -1))  # (H, N + V, C)
        w_uk, w_uv = w.split([a.qk_nope_head_dim, a.v_head_dim], 1)
        B, T = q_nope.shape[:2]
        q_latent = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), w_uk)  # (H, B*T, C)
        q = torch.cat((q_latent.transpose(0, 1).unflatten(0, (B, T)), q_rope), -1)  # (B, T, H, W)
        scores = torch.bmm(q.flatten(1, 2), entries.transpose(1, 2)).unflatten(1, (T, -1))  # (B, T, H, S)
        probs = torch.softmax(scores + mask.transpose(1, 2), dim=-1)
        out = torch.bmm(probs.flatten(1, 2), entries[..., : a.kv_lora_rank])  # (B, T*H, C)
        out = out.view(B * T, a.num_heads, -1).transpose(0, 1)  # (H, B*T, C)
        return torch.bmm(out, w_uv.transpose(1, 2)).transpose(0, 1).unflatten(0, (B, T))  # (B, T, H, V)


class Projection(nn.Linear):
    """A linear layer whose bias may stay fp32 beside a matrix in bf16, as precision.working_copy keeps vectors."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(x.dtype))


class GQA(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) as in Llama; with biases Qwen2's, with normed heads Qwen3's."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        a = cfg.attention
        assert isinstance(a, GQAConfig)
        self.shape, self.layer = a, layer
        self.interleaved, self.scale = cfg.rope.interleaved, cfg.softmax_scale
        self.wq = Projection(cfg.hidden_size, a.num_heads * a.head_dim, bias=a.qkv_bias)
        self.wk = Projection(cfg.hidden_size, a.num_kv_heads * a.head_dim, bias=a.qkv_bias)
        self.wv = Projection(cfg.hidden_size, a.num_kv_heads * a.head_dim, bias=a.qkv_bias)
        self.wo = Projection(a.num_heads * a.head_dim, cfg.hidden_size, bias=a.out_bias)
        self.q_norm = RMSNorm(a.head_dim, cfg.norm_eps) if a.qk_norm else None
        self.k_norm = RMSNorm(a.head_dim, cfg.norm_eps) if a.qk_norm else None

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """x: (B, T, D), normed. Returns (B, T, D)."""
        a = self.shape
        q = heads_of(x, self.wq, self.q_norm, a.num_heads)
        q = rotate(q * self.scale, ctx.rope, self.interleaved)
        entries = self.entries(x, ctx.rope)
        if ctx.cache is not None:
            entries = ctx.cache.extend(self.layer, entries)
        k, v = entries.unflatten(-1, (2 * a.num_kv_heads, -1)).transpose(1, 2).chunk(2, 1)  # (B, KV, S, head_dim)
        q = q.transpose(1, 2).unflatten(1, (a.num_kv_heads, -1))  # (B, KV, H/KV, T, head_dim)
        heads = weighted_values(q.flatten(2, 3), k, v, grouped(ctx.mask, a.num_heads // a.num_kv_heads))
        heads = heads.unflatten(2, (-1, x.shape[1])).flatten(1, 2)  # (B, H, T, head_dim)
        return self.wo(heads.transpose(1, 2).flatten(2))

    def entries(self, x: Tensor, rope: Tensor) -> Tensor:
        """What the cache keeps of x (B, T, D): rotated keys, then values, of all key/value heads, (B, T, W)."""
        k = rotate(heads_of(x, self.wk, self.k_norm, self.shape.num_kv_heads), rope, self.interleaved)
        return torch.cat((k.flatten(2), self.wv(x)), -1)


def heads_of(x: Tensor, linear: nn.Linear, norm: RMSNorm | None, num_heads: int) -> Tensor:
    """Project x (B, T, D) and cut it into heads (B, T, num_heads, head_dim), each normed if there is a norm."""
    heads = linear(x).unflatten(-1, (num_heads, -1))
    return heads if norm is None else norm(heads)


def grouped(mask: Tensor, size: int) -> Tensor:
    """The mask (B, 1, T, S) for `size` query heads laid one after the other along the query axis, (B, 1, size*T, S)."""
    return mask if size == 1 else mask.repeat(1, 1, size, 1)
