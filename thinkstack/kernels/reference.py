"""The operations of ops.py with torch's operators: complete, on any device, and the reference of every kernel.

RMSNorm, SwiGLU and the experts have custom backward passes: on a CPU these operations are memory-bound, and autograd's
composite backward pass moves two to three times the necessary bytes. Without gradients the forward function is called
directly.
"""

# Shapes in this file: B rows, T tokens, N = B*T, S tokens attended to, D hidden size, I intermediate size, H heads,
# R rotated width, G key/value heads or groups of experts, Q = H / G, K key width or experts per token, V value width,
# E experts, C capacity: rows per expert, a multiple of ROW_TILE.

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from thinkstack.kernels.masks import PackedMask, run_starts
from thinkstack.kernels.paging import KVLayout, Pages
from thinkstack.kernels.sizes import ROW_TILE


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        upcast = x.float()
        rstd = torch.rsqrt(torch.linalg.vecdot(upcast, upcast).div_(x.shape[-1]).add_(eps)).unsqueeze(-1)
        normed = upcast * rstd  # (..., D) fp32
        ctx.save_for_backward(normed, rstd, weight)
        return (normed * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        normed, rstd, weight = ctx.saved_tensors
        upcast = grad.float()
        grad_normed = upcast * normed
        inner = torch.linalg.vecdot(grad_normed, weight.float()).div_(normed.shape[-1]).unsqueeze(-1)
        grad_x = torch.addcmul(upcast * weight.float(), normed, inner, value=-1).mul_(rstd)
        grad_weight = grad_normed.reshape(-1, normed.shape[-1]).sum(0)
        return grad_x.to(grad.dtype), grad_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As in ops.py."""
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _swiglu_backward(grad, *ctx.saved_tensors)


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As in ops.py."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


class _Rotate(torch.autograd.Function):
    """The gradient is rotated by the negative angles."""

    @staticmethod
    def forward(ctx, x: Tensor, table: Tensor, interleaved: bool) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(table)
        ctx.interleaved = interleaved
        return _rotate(x, table, interleaved)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _rotate(grad, ctx.saved_tensors[0].conj(), ctx.interleaved), None, None


def _rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """Pairs of numbers as complex numbers times the table."""
    pairs = x.float().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = (pairs if interleaved else pairs.transpose(-1, -2)).contiguous()
    if pairs.storage_offset() % 2:  # complex numbers start at even offsets
        pairs = pairs.clone()
    rotated = torch.view_as_real(torch.view_as_complex(pairs) * table.unsqueeze(2))
    return (rotated if interleaved else rotated.transpose(-1, -2)).flatten(-2).to(x.dtype)


def rotate(x: Tensor, table: Tensor, interleaved: bool) -> Tensor:
    """As in ops.py."""
    return _Rotate.apply(x, table, interleaved) if torch.is_grad_enabled() else _rotate(x, table, interleaved)


def eager_attention(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scale: float) -> Tensor:
    """Softmax attention of query (B, T, G, Q, K), key (B, S, G, K), value (B, S, G, V) to (B, T, G, Q, V).

    Uses matmuls: for rows of a few hundred tokens the backward pass is faster than torch's fused CPU attention, and key
    and value heads may differ in width.
    """
    T, Q = query.shape[1], query.shape[3]
    rows = (query * scale).permute(0, 2, 1, 3, 4).flatten(2, 3)  # (B, G, T * Q, K)
    scores = rows @ key.permute(0, 2, 3, 1)  # (B, G, T * Q, S)
    scores = scores.unflatten(2, (T, Q)) + mask.additive(query.dtype).unsqueeze(3)
    out = torch.softmax(scores, dim=-1).flatten(2, 3) @ value.transpose(1, 2)  # (B, G, T * Q, V)
    return out.unflatten(2, (T, Q)).permute(0, 2, 1, 3, 4)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: PackedMask, scale: float) -> Tensor:
    """`eager_attention` with torch's fused attention: FlexAttention if the mask has a block mask, otherwise SDPA.

    For SDPA, values are padded to the width of the keys, because its fast kernels require equal widths.
    """
    Q = query.shape[3]
    q, k, v = query.flatten(2, 3).transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)  # (B, heads, T, ...)
    if mask.block_mask is not None:
        out = flex_attention(q, k, v, block_mask=mask.block_mask, scale=scale, enable_gqa=Q > 1)
        assert isinstance(out, Tensor)
    else:
        k, v = k.repeat_interleave(Q, 1), F.pad(v, (0, k.shape[-1] - v.shape[-1])).repeat_interleave(Q, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.additive(q.dtype), scale=scale)
    return out[..., : value.shape[-1]].transpose(1, 2).unflatten(2, (-1, Q))


def paged_attention(
    query: Tensor, pages: Pages, last: Tensor, layout: KVLayout, scale: float, max_elements: int = 1 << 26
) -> Tensor:
    """As `ops.paged_attend`. query: (N, G, Q, key_width); last: (N,). Returns (N, G, Q, V).

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
            # unused entries may contain any values of freed sequences, NaN included
            unused = places > seen[some].amax(1, keepdim=True)
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


def route(
    scores: Tensor, bias: Tensor, top_k: int, groups: tuple[int, int, int], normalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """As in ops.py."""
    num_groups, top_groups, scores_per_group = groups
    choice = scores.detach() + bias
    if top_groups < num_groups:
        grouped = choice.unflatten(-1, (num_groups, -1))  # (N, G, E/G)
        group_score = grouped.topk(scores_per_group, dim=-1).values.sum(-1)  # (N, G)
        group_idx = group_score.topk(top_groups, dim=-1).indices
        masked = torch.ones_like(group_score, dtype=torch.bool).scatter(1, group_idx, False)
        choice = grouped.masked_fill(masked[..., None], -math.inf).flatten(1)
    experts = choice.topk(top_k, dim=-1).indices  # (N, K)
    return expert_weights(scores, experts, normalize, factor), experts


def expert_weights(scores: Tensor, experts: Tensor, normalize: bool, factor: float) -> Tensor:
    """Weights (N, K) fp32 of the chosen experts (N, K) int64, from the scores (N, E)."""
    weights = scores.gather(1, experts)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # as in transformers: all scores may be 0
    return weights * factor


class TokenDispatch(NamedTuple):
    """The row of each (token, choice) pair in the padded input of the experts."""

    slot: Tensor
    """(N*K,) row of each pair among the (E*C) rows of expert input."""
    source: Tensor
    """(E*C,) token of each row; 0 for unused rows."""
    capacity: int
    """C."""


def dispatch_tokens(experts: Tensor, num_experts: int) -> TokenDispatch:
    """Sort pairs by expert, with the same number of rows for each expert. experts: (N, K) int64."""
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    capacity = -(-int(counts.max()) // ROW_TILE) * ROW_TILE
    shift = torch.arange(num_experts, device=flat.device) * capacity - (counts.cumsum(0) - counts)
    rows = torch.arange(flat.numel(), device=flat.device) + shift.repeat_interleave(counts)
    slot = torch.empty_like(flat).index_copy_(0, order, rows)
    source = flat.new_zeros(num_experts * capacity).index_copy_(0, rows, order // experts.shape[1])
    return TokenDispatch(slot, source, capacity)


class _PaddedExperts(torch.autograd.Function):
    """Tokens are moved by gathers in forward and backward pass, never by scatter-add, so that results do not depend on
    the order of threads."""

    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:  # type: ignore[override]
        E, K = w_in.shape[0], experts.shape[1]
        dispatched = dispatch_tokens(experts, E)
        rows = x.index_select(0, dispatched.source).view(E, dispatched.capacity, -1)  # (E, C, D)
        gate, up = torch.bmm(rows, w_in.transpose(1, 2)).chunk(2, -1)  # (E, C, I) each
        inner = F.silu(gate) * up
        out = torch.bmm(inner, w_out.transpose(1, 2)).flatten(0, 1)  # (E*C, D)
        picked = out.index_select(0, dispatched.slot).unflatten(0, (-1, K))  # (N, K, D)
        ctx.save_for_backward(rows, weights, dispatched.slot, dispatched.source, gate, up, inner, picked, w_in, w_out)
        return (picked * weights.to(x.dtype).unsqueeze(-1)).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        rows, weights, slot, source, gate, up, inner, picked, w_in, w_out = ctx.saved_tensors
        E, C = rows.shape[:2]
        grad_weights = torch.linalg.vecdot(picked, grad.unsqueeze(1))  # (N, K)
        row_weights = grad.new_zeros(E * C).index_copy_(0, slot, weights.flatten().to(grad.dtype))  # 0 in unused rows
        grad_out = (grad.index_select(0, source) * row_weights.unsqueeze(-1)).view(E, C, -1)
        grad_w_out = torch.bmm(grad_out.transpose(1, 2), inner)
        grad_hidden = torch.cat(_swiglu_backward(torch.bmm(grad_out, w_out), gate, up), -1)  # (E, C, 2I)
        grad_w_in = torch.bmm(grad_hidden.transpose(1, 2), rows)
        grad_rows = torch.bmm(grad_hidden, w_in).flatten(0, 1)  # (E*C, D)
        grad_x = grad_rows.index_select(0, slot).unflatten(0, weights.shape).sum(1)
        return grad_x, grad_weights.to(weights.dtype), None, grad_w_in, grad_w_out


def padded_experts(x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """As `ops.experts`, with one batched matmul per matrix: the rows of every expert are padded to the number of tokens
    of the busiest expert, so that no token is dropped."""
    return _PaddedExperts.apply(x, weights, experts, w_in, w_out)


def grouped_experts(x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """As `ops.experts`, with torch's grouped matmuls: without padding and without synchronization with the device."""
    E, K = w_in.shape[0], experts.shape[1]
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(flat.numel(), device=flat.device))
    ends = flat.new_zeros(E).scatter_add_(0, flat, torch.ones_like(flat)).cumsum(0).int()
    pairs = x.unsqueeze(1).expand(-1, K, -1).flatten(0, 1)  # (N*K, D); the gradient is summed in a fixed order
    hidden = F.grouped_mm(pairs.index_select(0, order), w_in.mT, offs=ends)
    gate, up = (part.contiguous() for part in hidden.chunk(2, -1))
    out = F.grouped_mm(swiglu(gate, up), w_out.mT, offs=ends)
    picked = out.index_select(0, place).unflatten(0, (-1, K))  # (N, K, D)
    return (picked * weights.to(x.dtype).unsqueeze(-1)).sum(1)


def logprobs(logits: Tensor, targets: Tensor, temperature: float, entropy: Tensor | None) -> tuple[Tensor, Tensor]:
    """As in ops.py."""
    logits = logits.float().div_(temperature)
    normalizer = logits.logsumexp(-1)
    found = logits.gather(1, targets.unsqueeze(1)).squeeze(1) - normalizer
    if entropy is not None:
        logits.sub_(normalizer.unsqueeze(1))
        entropy.copy_(-torch.linalg.vecdot(logits.exp(), logits))
    return found, normalizer


def logprobs_backward(logits: Tensor, targets: Tensor, normalizer: Tensor, grad: Tensor, temperature: float) -> Tensor:
    """As in ops.py."""
    scale = (grad / temperature).unsqueeze(1)
    probs = logits.float().div_(temperature).sub_(normalizer.unsqueeze(1)).exp_()
    return probs.mul_(-scale).scatter_add_(1, targets.unsqueeze(1), scale).to(logits.dtype)
