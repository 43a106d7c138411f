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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from thinkstack import kernels
from thinkstack.kernels import triton as cuda
from thinkstack.kernels.paging import Pages
from thinkstack.models.config import GQAConfig, MLAConfig, ModelConfig
from thinkstack.models.layers import ROW_TILE, Linear, RMSNorm, rotate


class LayerCache(Protocol):
    """The interface of the KV cache for an attention layer; every row of the pass is one new token."""

    def extend(self, layer: int, entries: Tensor) -> Pages:
        """Write the entries (N, 1, W) of the new tokens; returns the pages of their context, new entries included."""


@dataclass(kw_only=True)
class AttentionContext:
    """The common inputs of all attention layers in a forward pass."""

    rope: Tensor
    """Rotations of the new tokens, (B or 1, T, R / 2) complex64."""
    kv_range: Tensor
    """The earlier tokens that each new token attends to, (B or 1, T, 3) int32, from `kv_range_of`."""
    last: Tensor
    """The last token that each new token attends to, which is the token itself, (B or 1, T) int64, counted from the
    start of the row or of the cached context."""
    cache: LayerCache | None = None
    """The KV cache of the engine; None in training."""
    cached_mask: Tensor | None = None
    """The result of the first call of `mask`."""
    block_mask: BlockMask | None = None
    """The mask of FlexAttention; None if FlexAttention is not used."""

    def mask(self, span: int, dtype: torch.dtype) -> Tensor:
        """The additive mask over `span` tokens, (B or 1, 1, T, span): 0 = attended, -inf = masked."""
        if self.cached_mask is None:
            self.cached_mask = additive_mask(self.kv_range, self.last, span, dtype)
        return self.cached_mask


def additive_mask(kv_range: Tensor, last: Tensor, span: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (B or 1, 1, T, span): 0 = attended, -inf = masked. kv_range: (B or 1, T, 3). last: (B or 1, T)."""
    tokens = torch.arange(span, device=last.device)
    first, hidden_from, hidden_to = kv_range.unsqueeze(-2).unbind(-1)  # (B or 1, T, 1) each
    masked = (tokens < first) | (tokens > last.unsqueeze(-1)) | ((tokens >= hidden_from) & (tokens < hidden_to))
    return torch.zeros(masked.shape, dtype=dtype, device=last.device).masked_fill_(masked, -torch.inf).unsqueeze(1)


def run_starts(*ids: Tensor) -> Tensor:
    """The first index of the run of each token, (B, T). A run ends where any of `ids`, (B, T) each, changes."""
    changes = torch.stack([each[:, 1:] != each[:, :-1] for each in ids]).any(0)
    return torch.where(F.pad(changes, (1, 0)), torch.arange(ids[0].shape[1], device=ids[0].device), 0).cummax(1).values


def kv_range_of(document_ids: Tensor, branches: Tensor | None = None) -> Tensor:
    """The earlier tokens in the row that each token attends to, (B, T, 3) int32: the index of the first token, and a
    hidden interval (from, to), which is empty if both are equal.

    document_ids: (B, T); a document is a run of equal ids. branches: (B, T); within a document, 0 for the shared
    prompt, then 1, 2, ... for branches, which do not attend to each other. None: documents have no branches."""
    first = run_starts(document_ids)
    if branches is None:
        return torch.stack((first, first, first), -1).int()
    is_shared, places = branches == 0, torch.arange(first.shape[1], device=first.device)
    shared_end = torch.where(is_shared, places + 1, first).cummax(1).values
    hidden = torch.stack((shared_end, run_starts(document_ids, branches)), -1)
    hidden = torch.where(is_shared.unsqueeze(-1), first.unsqueeze(-1), hidden)
    return torch.cat((first.unsqueeze(-1), hidden), -1).int()


def eager_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention of query (B, T, G, Q, K), key (B, S, G, K), value (B, S, G, V) to (B, T, G, Q, V).

    Uses matmuls: for rows of a few hundred tokens the backward pass is faster than torch's fused CPU attention, and key
    and value heads may differ in width.
    """
    T, Q = query.shape[1], query.shape[3]
    rows = (query * scale).permute(0, 2, 1, 3, 4).flatten(2, 3)  # (B, G, T * Q, K)
    scores = rows @ key.permute(0, 2, 3, 1)  # (B, G, T * Q, S)
    scores = scores.unflatten(2, (T, Q)) + mask.unsqueeze(3)
    out = torch.softmax(scores, dim=-1).flatten(2, 3) @ value.transpose(1, 2)  # (B, G, T * Q, V)
    return out.unflatten(2, (T, Q)).permute(0, 2, 1, 3, 4)


def document_block_mask(kv_range: Tensor) -> BlockMask:
    """The block mask for FlexAttention: causal, and restricted to kv_range (B or 1, T, 3)."""
    rows, T, _ = kv_range.shape
    first, hidden_from, hidden_to = kv_range.unbind(-1)

    def is_attended(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_hidden = (key >= hidden_from[row, query]) & (key < hidden_to[row, query])
        return (key <= query) & (key >= first[row, query]) & ~is_hidden

    return create_block_mask(is_attended, rows if rows > 1 else None, None, T, T, device=kv_range.device)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, ctx: AttentionContext, scale: float) -> Tensor:
    """`eager_attention` with torch's fused attention: FlexAttention if the pass has a block mask, otherwise SDPA.

    For SDPA, values are padded to the width of the keys, because its fast kernels require equal widths.
    """
    T, Q = query.shape[1], query.shape[3]
    q, k, v = query.flatten(2, 3).transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, heads, T, ...)
    if ctx.block_mask is not None:
        out = flex_attention(q, k, v, block_mask=ctx.block_mask, scale=scale, enable_gqa=Q > 1)
        assert isinstance(out, Tensor)
    else:
        k, v = k.repeat_interleave(Q, 1), F.pad(v, (0, k.shape[-1] - v.shape[-1])).repeat_interleave(Q, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=ctx.mask(T, q.dtype), scale=scale)
    return out[..., : value.shape[-1]].transpose(1, 2).unflatten(2, (-1, Q))


def paged_attention_torch(
    query: Tensor, pages: Pages, last: Tensor, layout: kernels.KVLayout, scale: float, max_elements: int = 1 << 26
) -> Tensor:
    """`kernels.paged_attention` with torch's operators. query: (N, G, Q, key_width); last: (N,). Returns (N, G, Q, V).

    Batch-invariant: the shape of a matmul depends only on the positions of its tokens. Each matmul has ROW_TILE new
    tokens of one sequence and one block (padded), all blocks up to that block, and contiguous operands (the order of
    summation also depends on strides). Tiles with the same number of blocks are computed together, with at most
    `max_elements` elements of context at a time.
    """
    size = pages.entries.shape[1]
    blocks = last // size
    first = run_starts(pages.seq_index.unsqueeze(0), blocks.unsqueeze(0)).squeeze(0)
    lane = (torch.arange(len(last), device=last.device) - first) % ROW_TILE
    tile_starts = (lane == 0).nonzero().squeeze(1)  # the first token of each tile
    tile = (lane == 0).cumsum(0) - 1
    tiles = query.new_zeros(len(tile_starts), ROW_TILE, *query.shape[1:])
    tiles[tile, lane] = query
    seen = last.new_zeros(len(tile_starts), ROW_TILE)
    seen[tile, lane] = last
    out = query.new_empty(*tiles.shape[:-1], layout.value_width)
    for count in blocks[tile_starts].unique().tolist():
        span = (count + 1) * size
        places = torch.arange(span, device=last.device)
        same_span = (blocks[tile_starts] == count).nonzero().squeeze(1)
        for some in same_span.split(max(max_elements // (span * pages.entries.shape[2]), 1)):
            context = pages.of(pages.seq_index[tile_starts[some]], span)
            unused = places > seen[some].amax(
                1, keepdim=True
            )  # may contain any values of freed sequences, NaN included
            k, v = (
                part.transpose(1, 2).flatten(0, 1).contiguous()  # (tiles * G, span, K or V)
                for part in layout.split(context.masked_fill_(unused.unsqueeze(2), 0.0))
            )
            rows = (tiles[some] * scale).transpose(1, 2).reshape(len(k), -1, k.shape[-1])  # (tiles * G, -1, K)
            scores = torch.bmm(rows, k.mT).view(len(some), -1, ROW_TILE, query.shape[2], span)
            masked = (places > seen[some].unsqueeze(2))[:, None, :, None]  # (tiles, 1, ROW_TILE, 1, span)
            weights = torch.softmax(scores.masked_fill_(masked, -torch.inf), -1).view(len(k), -1, span)
            out[some] = torch.bmm(weights, v).view(len(some), -1, ROW_TILE, *out.shape[3:]).transpose(1, 2)
    return out[tile, lane]


class Attention(nn.Module):
    """The common part of MLA and GQA: attention of projected queries."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.interleaved, self.scale = layer, cfg.rope.interleaved, cfg.softmax_scale

    def attend_packed(
        self, q: Tensor, kv: Tensor, k_shared: Tensor | None, layout: kernels.KVLayout, ctx: AttentionContext
    ) -> Tensor:
        """Attention of the tokens of packed rows to each other.

        q: (B, T, H, K), not rotated. kv: (B, T, ...) entries in `layout`, not rotated. k_shared: (B, T, R), the part at
        the end of every key that heads share, or None. Returns (B, T, H, V).
        """
        if kernels.takes(q, "attend") and ctx.block_mask is None:
            return kernels.attend(q, kv, k_shared, ctx.rope, ctx.kv_range, layout, self.scale, self.interleaved)
        k, v = layout.split(kv)  # (B, T, G, ...)
        if k_shared is None:
            k = rotate(k, ctx.rope, self.interleaved)
        else:
            shared = rotate(k_shared.unsqueeze(2), ctx.rope, self.interleaved)
            k = torch.cat((k, shared.expand(-1, -1, layout.groups, -1)), -1)
        own = q.shape[-1] - 2 * ctx.rope.shape[-1]
        q = torch.cat((q[..., :own], rotate(q[..., own:], ctx.rope, self.interleaved)), -1)
        grouped = q.unflatten(2, (layout.groups, -1))
        if cuda.is_device(q) or ctx.block_mask is not None:
            return fused_attention(grouped, k, v, ctx, self.scale).flatten(2, 3)
        return eager_attention(grouped, k, v, ctx.mask(q.shape[1], q.dtype), self.scale).flatten(2, 3)

    def attend_paged(self, q: Tensor, pages: Pages, layout: kernels.KVLayout, ctx: AttentionContext) -> Tensor:
        """Attention of new tokens q (N, 1, H, K), rotated, to their cached contexts. Returns (N, 1, H, V)."""
        grouped, last = q.squeeze(1).unflatten(1, (layout.groups, -1)), ctx.last.squeeze(1)
        attend = (
            kernels.paged_attention
            if kernels.takes(q, "paged_attend")
            else cuda.paged_attention
            if cuda.takes(q)
            else paged_attention_torch
        )
        return attend(grouped, pages, last, layout, self.scale).flatten(1, 2).unsqueeze(1)


class MLA(Attention):
    """Multi-head latent attention (V2 report, section 2.1); names as in DeepSeek-V3 inference/model.py."""

    def __init__(self, cfg: ModelConfig, layer: int):
        super().__init__(cfg, layer)
        a = cfg.attention
        assert isinstance(a, MLAConfig)
        self.shape = a
        per_head = a.qk_nope_head_dim + a.v_head_dim
        nope = a.qk_nope_head_dim
        self.expanded_layout = kernels.KVLayout(a.num_heads, nope, per_head, nope, per_head, a.v_head_dim)
        self.absorbed_layout = kernels.KVLayout(1, a.cache_width, 0, 0, 0, a.kv_lora_rank)
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
            rotated = rotate(k_rope.unsqueeze(2), ctx.rope, self.interleaved).squeeze(2)
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
        q = torch.cat((q_latent, rotate(q_rope, ctx.rope, self.interleaved)), -1)  # (B, T, H, W)
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
        self.layout = kernels.KVLayout(a.num_kv_heads, a.head_dim, a.head_dim, width, a.head_dim, a.head_dim)
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
            rotated = rotate(k, ctx.rope, self.interleaved).flatten(2)
            context = ctx.cache.extend(self.layer, torch.cat((rotated, v), -1))
        if context is None:
            heads = self.attend_packed(q, torch.cat((k.flatten(2), v), -1), None, self.layout, ctx)
        else:
            heads = self.attend_paged(rotate(q, ctx.rope, self.interleaved), context, self.layout, ctx)
        return self.wo(heads.flatten(2))


def project_heads(x: Tensor, linear: nn.Linear, norm: RMSNorm | None, num_heads: int) -> Tensor:
    """Project x (B, T, D), split it into heads (B, T, num_heads, head_dim), and apply `norm` to each head if given."""
    heads = linear(x).unflatten(-1, (num_heads, -1))
    return heads if norm is None else norm(heads)
