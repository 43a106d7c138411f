"""Attention of new tokens over cached entries as one Triton kernel: prompts and decoding, latents and heads alike.

`read_pages` in models/attention.py says what it computes. Importing this module needs Triton.
"""

# Shapes in this file: N new tokens, G key/value heads, Q query heads per group, W key width, V value width,
# M blocks of the longest sequence, P tokens of a block, S parts that a context is cut into.

import torch
import triton
import triton.language as tl
from torch import Tensor

from thinkstack.models.kernels import Heads
from thinkstack.models.pages import Pages

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def attend(
    query, entries, tables, owner, last, out, log_sums,
    N, M, scale,
    G: tl.constexpr, Q: tl.constexpr, W: tl.constexpr, V: tl.constexpr, P: tl.constexpr,
    ENTRY: tl.constexpr, KEY_STEP: tl.constexpr, VALUE_AT: tl.constexpr, VALUE_STEP: tl.constexpr,
    TAIL: tl.constexpr,  # last part of a key, which is not part of a value that is the first part of its key; else 0
    TOKENS: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,  # queries read together: ROWS >= TOKENS * HEADS
    KEYS: tl.constexpr, S: tl.constexpr, PRECISION: tl.constexpr,
    MAIN_PAD: tl.constexpr, TAIL_PAD: tl.constexpr, V_PAD: tl.constexpr,  # powers of 2, 16 at least
):  # fmt: skip
    """A program reads, for one group of heads and one part of the context, the queries of up to TOKENS tokens.

    They begin where a sequence's new tokens begin or at a multiple of TOKENS; programs of other tokens end at once.
    """
    first = tl.program_id(0)
    tiles = tl.cdiv(Q, HEADS)
    group, head = tl.program_id(1) // tiles, tl.program_id(1) % tiles * HEADS
    part = tl.program_id(2)
    mine, at = tl.load(owner + first), tl.load(last + first)
    if TOKENS > 1:
        before = tl.maximum(first - 1, 0)
        goes_on = (first > 0) & (tl.load(owner + before) == mine) & (tl.load(last + before) + 1 == at)
        if goes_on & (at % TOKENS != 0):
            return

    rows = tl.arange(0, ROWS)
    ahead, heads = rows // HEADS, head + rows % HEADS
    tokens = first + ahead
    open_rows = (at % TOKENS + ahead < TOKENS) & (tokens < N) & (heads < Q)
    open_rows &= tl.load(owner + tokens, mask=open_rows, other=-1) == mine
    sees = tl.load(last + tokens, mask=open_rows, other=-1)
    open_rows &= sees == at + ahead
    end = tl.max(tl.where(open_rows, sees, 0), 0) + 1
    length = tl.cdiv(tl.cdiv(end, KEYS), S) * KEYS
    start, stop = part * length, tl.minimum(part * length + length, end)

    main, tail, values = tl.arange(0, MAIN_PAD), tl.arange(0, TAIL_PAD), tl.arange(0, V_PAD)
    places = ((tokens * G + group) * Q + heads).to(tl.int64)
    own = query + places[:, None] * W
    q = tl.load(own + main[None, :], mask=open_rows[:, None] & (main < W - TAIL)[None, :], other=0.0)
    if TAIL:
        q_tail = tl.load(own + W - TAIL + tail[None, :], mask=open_rows[:, None] & (tail < TAIL)[None, :], other=0.0)
    best = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, V_PAD), tl.float32)
    for begin in range(start, stop, KEYS):
        block = tl.load(tables + mine * M + begin // P).to(tl.int64)
        keys = begin + tl.arange(0, KEYS)
        entry = entries + (block * P + keys % P)[:, None] * ENTRY
        is_there = (keys < stop)[:, None]
        k = tl.load(entry + group * KEY_STEP + main[None, :], mask=is_there & (main < W - TAIL)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if TAIL:
            v = k
            k = tl.load(entry + W - TAIL + tail[None, :], mask=is_there & (tail < TAIL)[None, :], other=0.0)
            scores += tl.dot(q_tail, tl.trans(k), input_precision=PRECISION)
        else:
            at_value = entry + VALUE_AT + group * VALUE_STEP
            v = tl.load(at_value + values[None, :], mask=is_there & (values < V)[None, :], other=0.0)
        seen = (keys[None, :] <= sees[:, None]) & (keys < stop)[None, :]
        scores = tl.where(seen, scores * (scale * LOG2_E), -float("inf"))
        top = tl.maximum(best, tl.max(scores, 1))
        level = tl.where(top == -float("inf"), 0.0, top)
        weights = tl.exp2(scores - level[:, None])
        fade = tl.exp2(best - level)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        best = top

    sums = sums / tl.where(total > 0, total, 1.0)[:, None]
    places += part.to(tl.int64) * N * G * Q
    closed = open_rows[:, None] & (values < V)[None, :]
    tl.store(out + places[:, None] * V + values[None, :], sums.to(out.dtype.element_ty), mask=closed)
    if S > 1:
        tl.store(log_sums + places, (best + tl.log2(total)) / LOG2_E, mask=open_rows)


def read_cache(query: Tensor, pages: Pages, last: Tensor, heads: Heads, scale: float, parts: int = 0) -> Tensor:
    """Attention of new tokens over the cached entries of their sequences.

    query: (N, G, Q, key_width). pages: of N tokens. last: (N,) int64, the last entry that each token sees; those of a
    sequence lie together and count up. scale: factor of the scores. parts: pieces that contexts are cut into, which are
    read side by side; 0 for as many as the device has room for. Returns (N, G, Q, V).
    """
    (N, G, Q, W), V = query.shape, heads.value_width
    shape = _shape(Q, W, heads, pages, pages.longest_run != 1, query.dtype)
    tiles = G * triton.cdiv(Q, shape["HEADS"])
    S = parts or _parts(N * tiles, pages.tables.shape[1] * pages.entries.shape[1], query.device)
    out = query.new_empty(S, N, G, Q, V, dtype=query.dtype if S == 1 else torch.float32)
    log_sums = query.new_empty(S, N, G, Q, dtype=torch.float32)
    attend[(N, tiles, S)](
        query.contiguous(), pages.entries, pages.tables, pages.owner, last, out, log_sums,
        N, pages.tables.shape[1], scale,
        G=G, Q=Q, W=W, V=V, S=S, P=pages.entries.shape[1], ENTRY=pages.entries.shape[2],
        KEY_STEP=heads.key_step, VALUE_AT=heads.value_at, VALUE_STEP=heads.value_step,
        **shape, num_warps=8 if V > 128 else 4, num_stages=1 if query.dtype == torch.float32 else 2,
    )  # fmt: skip
    if S == 1:
        return out[0]
    return torch.einsum("sngq,sngqv->ngqv", torch.softmax(log_sums, 0), out).to(query.dtype)


def _shape(Q: int, W: int, heads: Heads, pages: Pages, has_runs: bool, dtype: torch.dtype) -> dict[str, int | str]:
    """How the kernel cuts its work: rows of queries, and keys at a time, so that both fit the device's fast memory."""
    V = heads.value_width
    is_latent = heads.groups == 1 and heads.value_at == 0 and V < W
    most = 32 if V > 128 else 64
    own = min(Q, most)
    rows = most if has_runs else max(16, triton.next_power_of_2(own))
    tail = W - V if is_latent else 0
    return dict(
        TAIL=tail,
        HEADS=own,
        ROWS=rows,
        TOKENS=rows // own if has_runs else 1,
        KEYS=min(pages.entries.shape[1], 64 if W <= 128 else 32),
        PRECISION="ieee" if dtype == torch.float32 else "tf32",
        MAIN_PAD=_padded(W - tail),
        TAIL_PAD=_padded(tail),
        V_PAD=_padded(V),
    )


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


PART = 256
"""Fewest keys that are worth a program of their own."""


def _parts(programs: int, longest: int, device: torch.device) -> int:
    """Pieces of a context that give every multiprocessor two programs, where contexts are long enough."""
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // programs
    return max(1, min(wanted, longest // PART, 32))
