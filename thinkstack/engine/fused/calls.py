"""Calls of the fused C++ kernels over a paged cache: grouped-query attention of new tokens, and all layers of a
model."""

# Shapes in this file: N or B new tokens, D hidden size, H heads, G key/value heads, W head width, L layers, P tokens
# per block. The C++ files document the other sizes.

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
"""Addresses of a layer's weights: matrices in bf16 or int8; vectors in fp32 (biases and head norms may be None);
per-row scales of int8 matrices, None for bf16."""

MLALayer = structure(
    "MLALayer",
    "attention_norm wq_a q_norm wq_b wkv_a kv_norm wkv_b wo ffn_norm w1 w2 w3 router bias w_in w_out",
    "I",
)
"""Addresses of a layer's fp32 weights, None for missing weights, and the intermediate size of w1."""

_MLAPass = structure(
    "MLAPass",
    "layers rope last block_tables seq_index x cache experts",
    "L B D H N R V C Q E J K groups top_groups scores_per_group normalize softmax "
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
    """Grouped-query attention of new tokens; the keys and values of these tokens are written to the cache first.

    qkv: (N, (H + 2 G) W), contiguous: the projected heads of queries, keys, values. norms: norms of query and key
    heads, (W,) fp32 or None. sizes: H, G, W, interleaved. rope: (N, W / 2) complex64. last: (N,) int64, the position
    of each token in its sequence. pages: pages of the N tokens. scales: as in gqa_pass. Returns (N, H W).
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
    is_int8: bool,
) -> None:
    """Run up to SMALL_M new tokens through layers of grouped-query attention and SwiGLU, in bf16.

    x: (B, D), contiguous; changed in place. layers: L GQALayers. sizes: H, G, W, I, interleaved. is_int8: whether
    matrices are int8. rope: (B, W / 2) complex64. last: (B,) int64, the positions of the new entries. pages: pages of
    the B tokens in the first layer. cache: (L, blocks, P, 2 G W); new entries are written to it. scales: scale of the
    attention scores, eps of the norms.
    """
    tensors = {"x": x, "rope": rope, "last": last, "cache": cache}
    run(
        "gqa_pass_int8" if is_int8 else "gqa_pass_bf16",
        _pass_arguments(_GQAPass, layers, tensors, pages, sizes | scales),
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
    """Run new tokens through a small model with latent attention; arithmetic in fp32, cache in fp32 or bf16.

    Arguments as in gqa_pass, for any number of tokens; layers: L MLALayers. sizes, with the names of mla_model.cpp: H,
    N, R, V, C, Q, interleaved, and with experts E, J, K, groups, top_groups, scores_per_group, normalize, softmax.
    cache: (L, blocks, P, C + R). scales: additionally the factor of the routed output. experts: (layers with experts,
    B, K) int64, an output.
    """
    tensors = {"x": x, "rope": rope, "last": last, "cache": cache, "experts": experts}
    run("mla_pass", _pass_arguments(_MLAPass, layers, tensors, pages, sizes | scales), cache.dtype == torch.bfloat16)


def _pass_arguments(
    kind: type[ctypes.Structure],
    layers: ctypes.Array[ctypes.Structure],
    tensors: dict[str, Tensor],
    pages: Pages,
    numbers: Mapping[str, float],
) -> ctypes.Structure:
    """The arguments of a fused pass of new tokens through all layers over a cache."""
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


def layer_array(
    kind: type[ctypes.Structure],
    weights: Sequence[Mapping[str, Tensor | None]],
    sizes: Sequence[Mapping[str, int]] = (),
) -> ctypes.Array[ctypes.Structure]:
    """An array with one structure per layer, from weights (which must stay alive) and sizes."""
    numbers = sizes or [{}] * len(weights)
    rows = [
        kind(**{name: address(x) for name, x in held.items()}, **own)
        for held, own in zip(weights, numbers, strict=True)
    ]
    return (kind * len(rows))(*rows)
