"""Kernels for inference, without gradients: paged attention, small-M matmuls, routing and sampling."""

# Shapes in this file: N or B new tokens, G key/value heads, Q query heads per group, W key width, V value width,
# D hidden size, R rotated width, E experts, K experts per token. The C++ files document sizes of other structures.

import ctypes

import numpy
import torch
from torch import Tensor

from thinkstack.kernels.cpu.calls import address, array_address, call, run, structure
from thinkstack.kernels.paging import KVLayout, Pages
from thinkstack.kernels.sampling import PenalizedTokens

_PagedAttention = structure(
    "PagedAttention",
    "query entries block_tables seq_index last out",
    "N G Q W V shift table_width entry_width key_g value_g value_at threads",
    "scale",
)
_Sample = structure(
    "Sample",
    "logits rows temperature top_k top_p min_p uniform seed num_tokens num_prompt_tokens offsets tokens logprobs",
    "B V threads",
)
_TokenBitmask = structure("TokenBitmask", "logits entries bitmask", "n W V threads")
_TopLogprobs = structure("TopLogprobs", "logits temperature ids logprobs", "B V count threads")
_Penalties = structure(
    "Penalties", "logits entries tokens num_outputs is_valid repetition presence frequency", "n W V threads"
)


def paged_attention(query: Tensor, pages: Pages, last: Tensor, layout: KVLayout, scale: float) -> Tensor:
    """As `ops.paged_attend`."""
    N, G, Q, W = query.shape
    query = query.contiguous()
    out = query.new_empty(N, G, Q, layout.value_width)
    arguments = _PagedAttention(
        *map(address, (query, pages.entries, pages.block_tables, pages.seq_index, last, out)),
        *(N, G, Q, W, layout.value_width, *block_layout(pages), pages.entries.shape[2]),
        *(layout.key_step, layout.value_step, layout.value_at, torch.get_num_threads(), scale),
    )
    run("paged_attention", arguments, query.dtype == torch.bfloat16)
    return out


def block_layout(pages: Pages) -> tuple[int, int]:
    """(log2 of the number of tokens per block, width of the block tables)."""
    assert pages.entries.is_contiguous() and pages.block_tables.is_contiguous()
    return pages.entries.shape[1].bit_length() - 1, pages.block_tables.shape[1]


def small_m_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Multiply x (..., K) by weight (M, K) transposed: (..., M), for at most SMALL_M rows, in bf16.

    scale: (M,) fp32 per-row scales of an int8 weight.
    """
    M, K = weight.shape
    out = x.new_empty(*x.shape[:-1], M)
    if scale is None:
        call("small_m_linear_bf16", x, weight, out, x.numel() // K, M, K)
    else:
        call("small_m_linear_int8", x, weight, scale, out, x.numel() // K, M, K)
    return out


def route(
    scores: Tensor, bias: Tensor, top_k: int, groups: tuple[int, int, int], normalize: bool, factor: float
) -> tuple[Tensor, Tensor]:
    """As `ops.route`; ties prefer the expert with the lower index."""
    weights = torch.empty(scores.shape[0], top_k)
    experts = torch.empty(scores.shape[0], top_k, dtype=torch.int64)
    call("route", scores, bias.float(), weights, experts, *scores.shape, top_k, *groups, int(normalize), factor)
    return weights, experts


def sample(
    logits: Tensor, temperature: Tensor, uniform: Tensor, filters: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """As `ops.sample`."""
    B = len(logits)
    tokens, logprobs, logits = torch.empty(B, dtype=torch.int64), torch.empty(B), logits.contiguous()
    given = dict(logits=logits, temperature=temperature, uniform=uniform, tokens=tokens, logprobs=logprobs)
    if filters is not None:
        given |= dict(zip(("top_k", "top_p", "min_p"), filters, strict=True))
    _run_sample(_Sample(**{name: address(x) for name, x in given.items()}), logits)
    return tokens, logprobs


def column_addresses(columns: dict[str, numpy.ndarray]) -> dict[str, int]:
    """The addresses of the columns of `ops.RowSampler`, for `sample_rows`."""
    return {name: array_address(column) for name, column in columns.items()}


def sample_rows(
    columns: dict[str, int], logits: Tensor, rows: numpy.ndarray, offsets: numpy.ndarray, is_unfiltered: bool
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """As `ops.RowSampler.sample`; columns: from `column_addresses`."""
    logits = logits.contiguous()
    tokens, logprobs = numpy.empty(len(rows), dtype=numpy.int64), numpy.empty(len(rows), dtype=numpy.float32)
    arguments = _Sample(**columns)
    if is_unfiltered:
        arguments.top_k = None
    arguments.logits = logits.data_ptr()
    arguments.rows, arguments.offsets = array_address(rows), array_address(offsets)
    arguments.tokens, arguments.logprobs = array_address(tokens), array_address(logprobs)
    _run_sample(arguments, logits)
    return tokens, logprobs


def top_logprobs(logits: Tensor, temperature: Tensor, filters: None, count: int) -> tuple[Tensor, Tensor]:
    """As `ops.top_logprobs`."""
    (B, V), logits = logits.shape, logits.contiguous()
    ids, logprobs = torch.empty(B, count, dtype=torch.int64), torch.empty(B, count)
    arguments = _TopLogprobs(*map(address, (logits, temperature, ids, logprobs)), B, V, count, torch.get_num_threads())
    run("top_logprobs", arguments, logits.dtype == torch.bfloat16)
    return ids, logprobs


def penalize_(logits: Tensor, penalized: PenalizedTokens) -> None:
    """As `ops.penalize_`."""
    sizes = *penalized.tokens.shape, logits.shape[1], torch.get_num_threads()
    run("penalize", _Penalties(logits.data_ptr(), *map(array_address, penalized), *sizes))


def apply_token_bitmask_(logits: Tensor, entries: numpy.ndarray, bitmask: numpy.ndarray) -> None:
    """As `ops.apply_token_bitmask_`."""
    pointers = logits.data_ptr(), *map(array_address, (entries, bitmask))
    run("apply_token_bitmask", _TokenBitmask(*pointers, *bitmask.shape, logits.shape[1], torch.get_num_threads()))


def _run_sample(arguments: ctypes.Structure, logits: Tensor) -> None:
    arguments.B, arguments.V = logits.shape
    arguments.threads = torch.get_num_threads()
    run("sample", arguments, logits.dtype == torch.bfloat16)
