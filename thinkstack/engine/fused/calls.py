"""Calls of the fused C++ passes: grouped-query attention of new tokens, and whole models over a paged cache."""

# Shapes in this file: N or B new tokens, D hidden size, H heads, G key/value heads, W head width, L layers, P tokens of
# a block. Other sizes of the structures are in their C++ files.

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from thinkstack.kernels.cpu.calls import address, run, structure
from thinkstack.kernels.cpu.inference import block_layout
from thinkstack.kernels.paging import Pages

_AttendGQA = structure(
    "AttendGQA",
    "qkv q_norm k_norm rope last block_tables seq_index query entries out",
    "N H G W shift table_width interleaved threads",
    "scale eps",
)

GQALayer = structure(
    "GQALayer",
    "wq wk wv wo w1 w2 w3 attention_norm ffn_norm q_norm k_norm bq bk bv bo sq sk sv so s1 s2 s3",
    "",
)
"""Addresses of a block's weights: matrices in bf16 or int8; vectors in fp32, of which biases and norms of heads may be
None; scales of the matrices' rows, None for bf16."""

MLALayer = structure(
    "MLALayer",
    "attention_norm wq_a q_norm wq_b wkv_a kv_norm wkv_b wo ffn_norm w1 w2 w3 router bias w_in w_out",
    "I",
)
"""Addresses of a layer's weights in fp32, None for what it lacks, and the width of w1."""

_MLAPass = structure(
    "MLAPass",
    "layers rope last block_tables seq_index x cache experts",
    "L B D H N R V C Q E J K groups top_groups best normalize softmax "
    "shift table_width layer_stride interleaved threads",
    "scale eps factor",
)

_GQAPass = structure(
    "GQAPass",
    "layers rope last block_tables seq_index x cache",
    "L B D H G W I shift table_width layer_stride interleaved threads",
    "scale eps",
)


def attend_gqa(
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
    the tokens in their sequences. pages: of N tokens. scales: as in gqa_pass. Returns (N, H W).
    """
    N, width = len(qkv), sizes["H"] * sizes["W"]
    query, out = qkv.new_empty(2, N, width)
    given = (qkv, *norms, rope, last, pages.block_tables, pages.seq_index, query, pages.entries, out)
    arguments = _AttendGQA(
        *map(address, given),
        **sizes,
        **scales,
        **dict(N=N, shift=block_layout(pages)[0], table_width=block_layout(pages)[1]),
        threads=torch.get_num_threads(),
    )
    run("attend_gqa", arguments, qkv.dtype == torch.bfloat16)
    return out


def gqa_pass(
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

    x: (B, D), contiguous; changed in place. layers: a GQALayer for each of L. sizes: H, G, W, I, interleaved.
    packed: whether matrices are int8. rope: (B, W / 2) complex64. last: (B,) int64, where the new entries go. pages: of
    B tokens, in the first layer. cache: (L, blocks, P, 2 G W); written to. scales: scale of the scores, eps of norms.
    """
    tensors = {"x": x, "rope": rope, "last": last, "cache": cache}
    run(
        "gqa_pass_int8" if packed else "gqa_pass_bf16",
        _over_cache(_GQAPass, layers, tensors, pages, sizes | scales),
    )


def mla_pass(
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

    Arguments as of gqa_pass, for any number of tokens; layers: a MLALayer each. sizes, as steps.cpp names them:
    H, N, R, V, C, Q, interleaved, and with experts E, J, K, groups, top_groups, best, normalize, softmax. cache:
    (L, blocks, P, C + R). scales: also factor of the routed output. experts: (layers that have some, B, K) int64;
    written.
    """
    tensors = {"x": x, "rope": rope, "last": last, "cache": cache, "experts": experts}
    run("mla_pass", _over_cache(_MLAPass, layers, tensors, pages, sizes | scales), cache.dtype == torch.bfloat16)


def _over_cache(
    kind: type[ctypes.Structure],
    layers: ctypes.Array[ctypes.Structure],
    tensors: dict[str, Tensor],
    pages: Pages,
    numbers: Mapping[str, float],
) -> ctypes.Structure:
    """The structure of a kernel that takes new tokens through all layers over a cache."""
    shift, table_width = block_layout(pages)
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
