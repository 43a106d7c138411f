"""Attention of new tokens over cached entries as one Triton kernel: prompts and decoding, latents and heads alike.

`paged_attention_torch` in models/attention.py says what it computes. Importing this module needs Triton.
"""

# Shapes in this file: N new tokens, G key/value heads, Q query heads per group, W key width, V value width,
# M blocks of the longest sequence, P tokens of a block, S parts that a context is cut into.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinkstack.kernels import KVLayout
from thinkstack.kernels.paging import Pages

LOG2_E = tl.constexpr(1.4426950408889634)
PART, MOST_PARTS = 256, 32
"""Fewest keys that are worth a program of their own; most pieces of a context."""


@triton.jit
def begins(first, seq_index, last, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether a program's token is the first that is read together: of a sequence's new ones, or at a multiple."""
    before = tl.maximum(first - 1, 0)
    at = tl.load(last + first)
    goes_on = (tl.load(seq_index + before) == tl.load(seq_index + first)) & (tl.load(last + before) + 1 == at)
    return (first == 0) | (at % TOKENS == 0) | (goes_on == 0)


@triton.jit
def queries(
    first, head, seq_index, last, N, Q: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr
):  # type: ignore[no-untyped-def]
    """Tokens and heads of a program's rows, the last key that each sees, and whether there is one, (ROWS,) each."""
    rows, at = tl.arange(0, ROWS), tl.load(last + first)
    ahead, heads = rows // HEADS, head + rows % HEADS
    tokens = first + ahead
    is_open = (at % TOKENS + ahead < TOKENS) & (tokens < N) & (heads < Q)
    is_open &= tl.load(seq_index + tokens, mask=is_open, other=-1) == tl.load(seq_index + first)
    sees = tl.load(last + tokens, mask=is_open, other=-1)
    return tokens, heads, sees, is_open & (sees == at + ahead)


@triton.jit
def part_of(rows, begin: tl.constexpr, width: tl.constexpr, PAD: tl.constexpr, is_there):  # type: ignore[no-untyped-def]
    """Some columns of rows of memory, (R, PAD); 0 beyond `width`, and in rows that are not there."""
    columns = tl.arange(0, PAD)[None, :]
    return tl.load(rows[:, None] + begin + columns, mask=is_there[:, None] & (columns < width), other=0.0)


@triton.jit
def gather(scores, v, best, total, sums, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add keys with these scores (to base 2) and values to what the rows have: their largest score, the sum of weights
    relative to it, and the weighted sum of values (arXiv:2205.14135)."""
    top = tl.maximum(best, tl.max(scores, 1))
    level = tl.where(top == -float("inf"), 0.0, top)  # rows that have seen nothing yet
    weights, fade = tl.exp2(scores - level[:, None]), tl.exp2(best - level)
    sums = sums * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return top, total * fade + tl.sum(weights, 1), sums


@triton.jit(do_not_specialize=["N"])  # it differs from step to step
def attend(
    query, entries, block_tables, seq_index, last, out, log_sums,
    N, M, scale,
    G: tl.constexpr, Q: tl.constexpr, W: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
    ENTRY: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_AT: tl.constexpr, VALUE_STEP: tl.constexpr,
    TAIL: tl.constexpr,  # last part of a key whose first part is its value too; 0 where values lie elsewhere
    TOKENS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,  # queries read together: ROWS >= TOKENS * HEADS
    KEYS: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
    MAIN_PAD: tl.constexpr, TAIL_PAD: tl.constexpr, V_PAD: tl.constexpr,  # powers of 2, 16 at least
):  # fmt: skip  # type: ignore[no-untyped-def]
    """A program reads one part of the context for one group of heads of up to TOKENS tokens.

    They begin where a sequence's new tokens begin or at a multiple of TOKENS; programs of other tokens end at once.
    """
    first, part, tiles = tl.program_id(0), tl.program_id(2), tl.cdiv(Q, HEADS)
    group, head = tl.program_id(1) // tiles, tl.program_id(1) % tiles * HEADS
    if not begins(first, seq_index, last, TOKENS):
        return
    tokens, heads, sees, is_open = queries(first, head, seq_index, last, N, Q, TOKENS, HEADS, ROWS)
    end = tl.max(tl.where(is_open, sees, 0), 0) + 1
    length = tl.cdiv(tl.cdiv(end, KEYS), S) * KEYS
    start, stop = part * length, tl.minimum(part * length + length, end)

    places = ((tokens * G + group) * Q + heads).to(tl.int64)
    q = part_of(query + places * W, 0, W - TAIL, MAIN_PAD, is_open)
    q_tail = part_of(query + places * W, W - TAIL, TAIL, TAIL_PAD, is_open)
    best, total = tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, V_PAD), tl.float32)
    for begin in range(start, stop, KEYS):
        block = tl.load(block_tables + tl.load(seq_index + first) * M + begin // P).to(tl.int64)
        keys = begin + tl.arange(0, KEYS)
        is_there, entry = keys < stop, entries + (block * P + keys % P) * ENTRY
        k = part_of(entry + group * KEY_STEP, 0, W - TAIL, MAIN_PAD, is_there)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TAIL:
            v = k
            k_tail = part_of(entry, W - TAIL, TAIL, TAIL_PAD, is_there)
            scores += tl.dot(q_tail, tl.trans(k_tail), input_precision=PRECISION)
        else:
            v = part_of(entry + group * VALUE_STEP, VALUE_AT, V, V_PAD, is_there)
        is_seen = (keys[None, :] <= sees[:, None]) & is_there[None, :]
        scores = tl.where(is_seen, scores * (scale * LOG2_E), -float("inf"))
        best, total, sums = gather(scores, v, best, total, sums, PRECISION)

    places += part.to(tl.int64) * N * G * Q
    values = tl.arange(0, V_PAD)[None, :]
    sums = (sums / tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty)
    tl.store(out + places[:, None] * V + values, sums, mask=is_open[:, None] & (values < V))
    if S > 1:
        tl.store(log_sums + places, (best + tl.log2(total)) / LOG2_E, mask=is_open)


def paged_attention(query: Tensor, pages: Pages, last: Tensor, heads: KVLayout, scale: float, parts: int = 0) -> Tensor:
    """Attention of new tokens over the cached entries of their sequences.

    query: (N, G, Q, key_width). pages: of N tokens. last: (N,) int64, the last entry that each token sees; those of a
    sequence lie together and count up. scale: factor of the scores. parts: pieces that contexts are cut into, which are
    read side by side; 0 for as many as the device has room for. Returns (N, G, Q, V).
    """
    (N, G, Q, _), V = query.shape, heads.value_width
    shape = shape_of(query, pages, heads)
    tiles = G * triton.cdiv(Q, shape["HEADS"])
    S = parts or _parts(N * tiles, pages.block_tables.shape[1] * pages.entries.shape[1], query.device)
    out = query.new_empty(S, N, G, Q, V, dtype=query.dtype if S == 1 else torch.float32)
    log_sums = query.new_empty(S, N, G, Q, dtype=torch.float32)
    given = (query.contiguous(), pages.entries, pages.block_tables, pages.seq_index, last, out, log_sums)
    attend[(N, tiles, S)](*given, N, pages.block_tables.shape[1], scale, S=S, **shape, **options_of(shape))
    if S == 1:
        return out[0]
    return torch.einsum("sngq,sngqv->ngqv", torch.softmax(log_sums, 0), out).to(query.dtype)


def shape_of(query: Tensor, pages: Pages, heads: KVLayout) -> dict[str, Any]:
    """Sizes that the kernel is compiled for: those of the heads, and how many rows of queries and keys are multiplied
    at a time, so that both stay in the fast memory of a multiprocessor."""
    (_, G, Q, W), (_, P, entry), V = query.shape, pages.entries.shape, heads.value_width
    tail = W - V if G == 1 and heads.value_at == 0 else 0
    is_wide, is_exact = V > 128, query.dtype == torch.float32  # fp32 is multiplied without tensor cores, in registers
    most = 16 if is_exact else 32 if is_wide else 64
    own = min(Q, most)
    rows = max(16, triton.next_power_of_2(own)) if pages.longest_run == 1 else most
    return dict(
        **dict(G=G, Q=Q, W=W, V=V, P=P, ENTRY=entry, TAIL=tail),
        **dict(KEY_STEP=heads.key_step, VALUE_AT=heads.value_at, VALUE_STEP=heads.value_step),
        **dict(HEADS=own, ROWS=rows, TOKENS=1 if pages.longest_run == 1 else rows // own),
        KEYS=min(P, 16 if is_exact else 32 if is_wide else 64),
        PRECISION="ieee" if is_exact else "tf32",
        **dict(MAIN_PAD=_padded(W - tail), TAIL_PAD=_padded(tail), V_PAD=_padded(V)),
    )


def options_of(shape: dict[str, Any]) -> dict[str, int]:
    """Warps that share a program's sums, and keys on their way at once."""
    return dict(num_warps=8 if shape["ROWS"] * shape["V"] > 4096 else 4, num_stages=1 if shape["KEYS"] == 16 else 2)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _parts(programs: int, longest: int, device: torch.device) -> int:
    """Pieces of a context that give every multiprocessor two programs, where contexts are long enough."""
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // programs
    return max(1, min(wanted, longest // PART, MOST_PARTS))
