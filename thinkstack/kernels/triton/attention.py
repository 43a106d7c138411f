"""Paged attention as one Triton kernel, for prefill and decoding, with MLA latents or GQA heads.

The reference is `paged_attention` in kernels/reference.py. Importing this module requires Triton.
"""

# Shapes in this file: N new tokens, G key/value heads, Q query heads per group, W key width, V value width,
# M blocks of the longest sequence, P tokens per block, S parts of a context (split KV).

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinkstack.kernels.paging import KVLayout, Pages

LOG2_E = tl.constexpr(1.4426950408889634)
MIN_PART_KEYS, MAX_PARTS = 256, 32
"""Minimum number of keys of a part of the context; maximum number of parts of a context."""


@triton.jit
def starts_tile(first, seq_index, last, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether a program's token is the first of a tile: the first new token of its sequence, or at a multiple of
    TOKENS."""
    before = tl.maximum(first - 1, 0)
    at = tl.load(last + first)
    continues = (tl.load(seq_index + before) == tl.load(seq_index + first)) & (tl.load(last + before) + 1 == at)
    return (first == 0) | (at % TOKENS == 0) | (continues == 0)


@triton.jit
def tile_rows(
    first, head, seq_index, last, N, Q: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr
):  # type: ignore[no-untyped-def]
    """Token, head, last key and validity of each row of a program, (ROWS,) each."""
    rows, at = tl.arange(0, ROWS), tl.load(last + first)
    ahead, heads = rows // HEADS, head + rows % HEADS
    tokens = first + ahead
    is_open = (at % TOKENS + ahead < TOKENS) & (tokens < N) & (heads < Q)
    is_open &= tl.load(seq_index + tokens, mask=is_open, other=-1) == tl.load(seq_index + first)
    last_keys = tl.load(last + tokens, mask=is_open, other=-1)
    return tokens, heads, last_keys, is_open & (last_keys == at + ahead)


@triton.jit
def load_columns(rows, begin: tl.constexpr, width: tl.constexpr, PAD: tl.constexpr, is_valid):  # type: ignore[no-untyped-def]
    """Load columns [begin, begin + width) of rows, (R, PAD); 0 beyond `width` and in invalid rows."""
    columns = tl.arange(0, PAD)[None, :]
    return tl.load(rows[:, None] + begin + columns, mask=is_valid[:, None] & (columns < width), other=0.0)


@triton.jit
def update_softmax(scores, v, row_max, row_sum, sums, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The online softmax update (arXiv:2205.14135) for keys with these scores (base 2) and values. Per row, updates the
    largest score, the sum of weights relative to it, and the weighted sum of values."""
    top = tl.maximum(row_max, tl.max(scores, 1))
    level = tl.where(top == -float("inf"), 0.0, top)  # rows without a key so far
    weights, rescale = tl.exp2(scores - level[:, None]), tl.exp2(row_max - level)
    sums = sums * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return top, row_sum * rescale + tl.sum(weights, 1), sums


@triton.jit(do_not_specialize=["N"])  # N differs from step to step
def paged_attention_kernel(
    query, entries, block_tables, seq_index, last, out, log_sums,
    N, M, scale,
    G: tl.constexpr, Q: tl.constexpr, W: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
    ENTRY: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_AT: tl.constexpr, VALUE_STEP: tl.constexpr,
    TAIL: tl.constexpr,  # width of the key's last part if its first part is the value (MLA); 0 if values are separate
    TOKENS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,  # the query tile: ROWS >= TOKENS * HEADS
    KEYS: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
    MAIN_PAD: tl.constexpr, TAIL_PAD: tl.constexpr, V_PAD: tl.constexpr,  # powers of 2, at least 16
):  # fmt: skip  # type: ignore[no-untyped-def]
    """A program computes one part of the context for one group of heads of a tile of up to TOKENS tokens.

    A tile starts at the first new token of a sequence or at a multiple of TOKENS; other programs return at once.
    """
    first, part, tiles = tl.program_id(0), tl.program_id(2), tl.cdiv(Q, HEADS)
    group, head = tl.program_id(1) // tiles, tl.program_id(1) % tiles * HEADS
    if not starts_tile(first, seq_index, last, TOKENS):
        return
    tokens, heads, last_keys, is_open = tile_rows(first, head, seq_index, last, N, Q, TOKENS, HEADS, ROWS)
    end = tl.max(tl.where(is_open, last_keys, 0), 0) + 1
    length = tl.cdiv(tl.cdiv(end, KEYS), S) * KEYS
    start, stop = part * length, tl.minimum(part * length + length, end)

    row_offsets = ((tokens * G + group) * Q + heads).to(tl.int64)
    q = load_columns(query + row_offsets * W, 0, W - TAIL, MAIN_PAD, is_open)
    q_tail = load_columns(query + row_offsets * W, W - TAIL, TAIL, TAIL_PAD, is_open)
    row_max, row_sum = tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, V_PAD), tl.float32)
    for begin in range(start, stop, KEYS):
        block = tl.load(block_tables + tl.load(seq_index + first) * M + begin // P).to(tl.int64)
        keys = begin + tl.arange(0, KEYS)
        is_valid, entry = keys < stop, entries + (block * P + keys % P) * ENTRY
        k = load_columns(entry + group * KEY_STEP, 0, W - TAIL, MAIN_PAD, is_valid)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TAIL:
            v = k
            k_tail = load_columns(entry, W - TAIL, TAIL, TAIL_PAD, is_valid)
            scores += tl.dot(q_tail, tl.trans(k_tail), input_precision=PRECISION)
        else:
            v = load_columns(entry + group * VALUE_STEP, VALUE_AT, V, V_PAD, is_valid)
        is_seen = (keys[None, :] <= last_keys[:, None]) & is_valid[None, :]
        scores = tl.where(is_seen, scores * (scale * LOG2_E), -float("inf"))
        row_max, row_sum, sums = update_softmax(scores, v, row_max, row_sum, sums, PRECISION)

    row_offsets += part.to(tl.int64) * N * G * Q
    values = tl.arange(0, V_PAD)[None, :]
    sums = (sums / tl.where(row_sum > 0, row_sum, 1.0)[:, None]).to(out.dtype.element_ty)
    tl.store(out + row_offsets[:, None] * V + values, sums, mask=is_open[:, None] & (values < V))
    if S > 1:
        tl.store(log_sums + row_offsets, (row_max + tl.log2(row_sum)) / LOG2_E, mask=is_open)


def paged_attention(
    query: Tensor, pages: Pages, last: Tensor, layout: KVLayout, scale: float, parts: int = 0
) -> Tensor:
    """Attention of new tokens over the cached entries of their sequences.

    query: (N, G, Q, key_width). pages: pages of the N tokens. last: (N,) int64, the last entry that each token attends
    to; the tokens of a sequence are adjacent and in order. scale: factor of the scores. parts: number of parts of a
    context that are read in parallel; 0: enough to fill the device. Returns (N, G, Q, V).
    """
    (N, G, Q, _), V = query.shape, layout.value_width
    shape = shape_of(query, pages, layout)
    tiles = G * triton.cdiv(Q, shape["HEADS"])
    S = parts or _parts(N * tiles, pages.block_tables.shape[1] * pages.entries.shape[1], query.device)
    out = query.new_empty(S, N, G, Q, V, dtype=query.dtype if S == 1 else torch.float32)
    log_sums = query.new_empty(S, N, G, Q, dtype=torch.float32)
    given = (query.contiguous(), pages.entries, pages.block_tables, pages.seq_index, last, out, log_sums)
    paged_attention_kernel[(N, tiles, S)](
        *given, N, pages.block_tables.shape[1], scale, S=S, **shape, **options_of(shape)
    )
    if S == 1:
        return out[0]
    return torch.einsum("sngq,sngqv->ngqv", torch.softmax(log_sums, 0), out).to(query.dtype)


def shape_of(query: Tensor, pages: Pages, layout: KVLayout) -> dict[str, Any]:
    """Compile-time sizes of the kernel: sizes of heads, and of tiles of queries and keys that fit into the shared
    memory of a multiprocessor."""
    (_, G, Q, W), (_, P, entry), V = query.shape, pages.entries.shape, layout.value_width
    tail = W - V if G == 1 and layout.value_at == 0 else 0
    is_wide, is_exact = V > 128, query.dtype == torch.float32  # fp32 is multiplied in registers, without tensor cores
    most = 16 if is_exact else 32 if is_wide else 64
    own = min(Q, most)
    rows = max(16, triton.next_power_of_2(own)) if pages.longest_run == 1 else most
    return dict(
        **dict(G=G, Q=Q, W=W, V=V, P=P, ENTRY=entry, TAIL=tail),
        **dict(KEY_STEP=layout.key_step, VALUE_AT=layout.value_at, VALUE_STEP=layout.value_step),
        **dict(HEADS=own, ROWS=rows, TOKENS=1 if pages.longest_run == 1 else rows // own),
        KEYS=min(P, 16 if is_exact else 32 if is_wide else 64),
        PRECISION="ieee" if is_exact else "tf32",
        **dict(MAIN_PAD=_padded(W - tail), TAIL_PAD=_padded(tail), V_PAD=_padded(V)),
    )


def options_of(shape: dict[str, Any]) -> dict[str, int]:
    """Number of warps per program, and number of stages of the key pipeline."""
    return dict(num_warps=8 if shape["ROWS"] * shape["V"] > 4096 else 4, num_stages=1 if shape["KEYS"] == 16 else 2)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _parts(programs: int, longest: int, device: torch.device) -> int:
    """The number of parts of a context that gives every multiprocessor two programs, if contexts are long enough."""
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // programs
    return max(1, min(wanted, longest // MIN_PART_KEYS, MAX_PARTS))
