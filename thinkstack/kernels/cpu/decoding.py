"""Inference on new tokens: reading a cache, whole models, routing and drawing. No gradients."""

# Shapes in this file: N or B new tokens, G key/value heads, Q query heads per group, W key width, V value width,
# D hidden size, R rotated width, E experts, K experts per token. Other structures' sizes are in their C++ files.

import ctypes
from collections.abc import Mapping, Sequence

import numpy
import torch
from torch import Tensor

from thinkstack.kernels.cpu.calls import address, call, place, run, structure
from thinkstack.kernels.cpu.operators import KVLayout
from thinkstack.kernels.paging import Pages

_Decode = structure(
    "Decode",
    "query entries block_tables seq_index last out",
    "N G Q W V shift table_width entry_width key_g value_g value_at threads",
    "scale",
)
_AttendNew = structure(
    "AttendNew",
    "qkv q_norm k_norm rope last block_tables seq_index query entries out",
    "N H G W shift table_width interleaved threads",
    "scale eps",
)
_Draw = structure(
    "Draw",
    "logits rows temperature top_k top_p min_p uniform seed num_tokens num_prompt_tokens offsets tokens logprobs",
    "B V threads",
)
BlockWeights = structure(
    "BlockWeights",
    "wq wk wv wo w1 w2 w3 attention_norm ffn_norm q_norm k_norm bq bk bv bo sq sk sv so s1 s2 s3",
    "",
)
"""Addresses of a block's weights: matrices in bf16 or int8; vectors in fp32, of which biases and norms of heads may be
None; scales of the matrices' rows, None for bf16."""
LatentLayer = structure(
    "LatentLayer",
    "attention_norm wq_a q_norm wq_b wkv_a kv_norm wkv_b wo ffn_norm w1 w2 w3 router bias w_in w_out",
    "I",
)
"""Addresses of a layer's weights in fp32, None for what it lacks, and the width of w1."""
_LatentModel = structure(
    "LatentModel",
    "layers rope last block_tables seq_index x cache experts",
    "L B D H N R V C Q E J K groups top_groups best normalize softmax "
    "shift table_width layer_stride interleaved threads",
    "scale eps factor",
)
_BlockSteps = structure(
    "BlockSteps",
    "layers rope last block_tables seq_index x cache",
    "L B D H G W I shift table_width layer_stride interleaved threads",
    "scale eps",
)


def paged_attention(query: Tensor, pages: Pages, last: Tensor, heads: KVLayout, scale: float) -> Tensor:
    """Attention of new tokens over the cached entries of their sequences.

    query: (N, G, Q, key_width). pages: of N tokens. last: (N,) int64, the last entry that each token sees. scale:
    factor of the scores. Returns (N, G, Q, V).
    """
    N, G, Q, W = query.shape
    query = query.contiguous()
    out = query.new_empty(N, G, Q, heads.value_width)
    arguments = _Decode(
        *map(address, (query, pages.entries, pages.block_tables, pages.seq_index, last, out)),
        *(N, G, Q, W, heads.value_width, *_layout(pages), pages.entries.shape[2]),
        *(heads.key_step, heads.value_step, heads.value_at, torch.get_num_threads(), scale),
    )
    run("decode", arguments, query.dtype == torch.bfloat16)
    return out


def attend_gqa_step(
    qkv: Tensor,
    norms: tuple[Tensor | None, Tensor | None],
    sizes: Mapping[str, int],
    rope: Tensor,
    last: Tensor,
    pages: Pages,
    scales: Mapping[str, float],
) -> Tensor:
    """Grouped-query attention of new tokens whose keys and values go to the cache first.

    qkv: (N, (H + 2 G) W), contiguous: the projected heads of queries, keys, values. norms: of the heads of queries and
    keys, (W,) fp32, or None. sizes: H, G, W, interleaved. rope: (N, W / 2) complex64. last: (N,) int64, the places of
    the tokens in their sequences. pages: of N tokens. scales: as in block_steps. Returns (N, H W).
    """
    N, width = len(qkv), sizes["H"] * sizes["W"]
    query, out = qkv.new_empty(2, N, width)
    given = (qkv, *norms, rope, last, pages.block_tables, pages.seq_index, query, pages.entries, out)
    arguments = _AttendNew(
        *map(address, given),
        **sizes,
        **scales,
        **dict(N=N, shift=_layout(pages)[0], table_width=_layout(pages)[1]),
        threads=torch.get_num_threads(),
    )
    run("attend_gqa_step", arguments, qkv.dtype == torch.bfloat16)
    return out


def _layout(pages: Pages) -> tuple[int, int]:
    """Power of 2 of a block's tokens, and width of the block_tables."""
    assert pages.entries.is_contiguous() and pages.block_tables.is_contiguous()
    return pages.entries.shape[1].bit_length() - 1, pages.block_tables.shape[1]


def block_steps(
    x: Tensor,
    layers: ctypes.Array[ctypes.Structure],
    sizes: dict[str, int],
    rope: Tensor,
    last: Tensor,
    pages: Pages,
    cache: Tensor,
    scales: dict[str, float],
    packed: bool,
) -> None:
    """At most SMALL_M new tokens through blocks of grouped-query attention and SwiGLU, in bf16.

    x: (B, D), contiguous; changed in place. layers: a BlockWeights for each of L. sizes: H, G, W, I, interleaved.
    packed: whether matrices are int8. rope: (B, W / 2) complex64. last: (B,) int64, where the new entries go. pages: of
    B tokens, in the first layer. cache: (L, blocks, P, 2 G W); written to. scales: scale of the scores, eps of norms.
    """
    tensors = {"x": x, "rope": rope, "last": last, "cache": cache}
    run(
        "block_steps_int8" if packed else "block_steps_bf16",
        _over_cache(_BlockSteps, layers, tensors, pages, sizes | scales),
    )


def latent_model(
    x: Tensor,
    layers: ctypes.Array[ctypes.Structure],
    sizes: dict[str, int],
    rope: Tensor,
    last: Tensor,
    pages: Pages,
    cache: Tensor,
    scales: dict[str, float],
    experts: Tensor,
) -> None:
    """New tokens through a small model with latent attention, in fp32 over a cache in fp32 or bf16.

    Arguments as of block_steps, for any number of tokens; layers: a LatentLayer each. sizes, as steps.cpp names them:
    H, N, R, V, C, Q, interleaved, and with experts E, J, K, groups, top_groups, best, normalize, softmax. cache:
    (L, blocks, P, C + R). scales: also factor of the routed output. experts: (layers that have some, B, K) int64;
    written.
    """
    tensors = {"x": x, "rope": rope, "last": last, "cache": cache, "experts": experts}
    run(
        "latent_model", _over_cache(_LatentModel, layers, tensors, pages, sizes | scales), cache.dtype == torch.bfloat16
    )


def _over_cache(
    kind: type[ctypes.Structure],
    layers: ctypes.Array[ctypes.Structure],
    tensors: dict[str, Tensor],
    pages: Pages,
    numbers: Mapping[str, float],
) -> ctypes.Structure:
    """The structure of a kernel that takes new tokens through all layers over a cache."""
    shift, table_width = _layout(pages)
    (B, D), cache = tensors["x"].shape, tensors["cache"]
    addresses = {
        name: address(x)
        for name, x in (tensors | {"block_tables": pages.block_tables, "seq_index": pages.seq_index}).items()
    }
    return kind(
        layers=ctypes.addressof(layers),
        **addresses,
        **numbers,
        **dict(L=len(layers), B=B, D=D, shift=shift, table_width=table_width, layer_stride=cache.stride(0)),
        threads=torch.get_num_threads(),
    )


def rows_of(
    kind: type[ctypes.Structure],
    weights: Sequence[Mapping[str, Tensor | None]],
    sizes: Sequence[Mapping[str, int]] = (),
) -> ctypes.Array[ctypes.Structure]:
    """A structure for each of `weights`, which must stay alive as long, and of sizes."""
    numbers = sizes or [{}] * len(weights)
    rows = [
        kind(**{name: address(x) for name, x in held.items()}, **own)
        for held, own in zip(weights, numbers, strict=True)
    ]
    return (kind * len(rows))(*rows)


def small_m_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """x (..., K) times weight (M, K) transposed: (..., M), for at most SMALL_M rows, in bf16.

    scale: (M,) fp32 factors of the rows of a weight in int8.
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
    """Group-limited top-k; arguments as in models/moe.py.

    scores: (B, E) fp32. groups: how many there are, how many may be used, affinities of a group that count (1 or 2).
    Returns (weights (B, K) fp32, experts (B, K) int64); of equal affinities the lower expert is chosen.
    """
    weights = torch.empty(scores.shape[0], top_k)
    experts = torch.empty(scores.shape[0], top_k, dtype=torch.int64)
    call("route", scores, bias, weights, experts, *scores.shape, top_k, *groups, int(normalize), factor)
    return weights, experts


def draw(
    logits: Tensor, temperature: Tensor, uniform: Tensor, kept: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """A token per row of logits (B, V); arguments and results as in engine/sampler.py."""
    B = len(logits)
    tokens, logprobs, logits = torch.empty(B, dtype=torch.int64), torch.empty(B), logits.contiguous()
    given = dict(logits=logits, temperature=temperature, uniform=uniform, tokens=tokens, logprobs=logprobs)
    if kept is not None:
        given |= dict(zip(("top_k", "top_p", "min_p"), kept, strict=True))
    _run_draw(_Draw(**{name: address(x) for name, x in given.items()}), logits)
    return tokens, logprobs


class RowSampler:
    """`draw` for rows whose settings lie in columns, each row with its own numbers (`uniforms` in engine/sampler.py).

    The columns may change their contents, not their places.
    """

    def __init__(self, **columns: numpy.ndarray):
        """columns: temperature, top_p, min_p fp32; top_k, num_tokens, prompt int64; seed uint64."""
        self._columns = columns
        self._settings = {name: place(column) for name, column in columns.items()}

    def draw(
        self, logits: Tensor, rows: numpy.ndarray, offsets: numpy.ndarray, is_unfiltered: bool
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """From logits (B, V) of rows (B,), the offsets-th token, (B,) from 0, after a row's num_tokens ones.

        is_unfiltered: whether top_k, top_p and min_p are neutral in these rows. Returns what `draw` does.
        """
        logits = logits.contiguous()
        tokens, logprobs = numpy.empty(len(rows), dtype=numpy.int64), numpy.empty(len(rows), dtype=numpy.float32)
        arguments = _Draw(**self._settings)
        if is_unfiltered:
            arguments.top_k = None
        arguments.logits, arguments.rows, arguments.offsets = logits.data_ptr(), place(rows), place(offsets)
        arguments.tokens, arguments.logprobs = place(tokens), place(logprobs)
        _run_draw(arguments, logits)
        return tokens, logprobs


def _run_draw(arguments: ctypes.Structure, logits: Tensor) -> None:
    arguments.B, arguments.V = logits.shape
    arguments.threads = torch.get_num_threads()
    run("draw", arguments, logits.dtype == torch.bfloat16)
