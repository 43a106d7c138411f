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


_PASSES = {"gqa_pass_bf16": _GQAPass, "gqa_pass_int8": _GQAPass, "mla_pass": _MLAPass}
Numbers = Mapping[str, float]


def attend_gqa(
    qkv: Tensor, norms: tuple[Tensor | None, Tensor | None], numbers: Numbers, rope: Tensor, last: Tensor, pages: Pages
) -> Tensor:
    """Grouped-query attention of new tokens; the keys and values of these tokens are written to the cache first.

    qkv: (N, (H + 2 G) W), contiguous: the projected heads of queries, keys, values. norms: norms of query and key
    heads, (W,) fp32 or None. numbers: H, G, W, interleaved, scale of the scores, eps of the norms. rope: (N, W / 2)
    complex64. last: (N,) int64, the position of each token in its sequence. pages: pages of the N tokens. Returns
    (N, H W).
    """
    N, (shift, table_width) = len(qkv), block_layout(pages)
    query, out = qkv.new_empty(2, N, int(numbers["H"] * numbers["W"]))
    given = (qkv, *norms, rope, last, pages.block_tables, pages.seq_index, query, pages.entries, out)
    sizes = dict(N=N, shift=shift, table_width=table_width, threads=torch.get_num_threads())
    run("attend_gqa", _AttendGQA(*map(address, given), **sizes, **numbers), qkv.dtype == torch.bfloat16)
    return out


def run_pass(
    kernel: str,
    layers: ctypes.Array[ctypes.Structure],
    numbers: Numbers,
    x: Tensor,
    rope: Tensor,
    last: Tensor,
    pages: Pages,
    cache: Tensor,
    experts: Tensor | None = None,
) -> None:
    """Run new tokens through all layers of a model over a cache.

    kernel: "gqa_pass_bf16" or "gqa_pass_int8", by the dtype of the matrices, for up to SMALL_M tokens in bf16;
    "mla_pass" for any number of tokens in fp32 and a cache in fp32 or bf16. layers: L GQALayers or MLALayers. numbers:
    sizes and scales of the kernel's structure, with the names of the C++ file. x: (B, D), contiguous; changed in place.
    rope: (B, R / 2) complex64, R the rotated width. last: (B,) int64, the positions of the new entries. pages: pages of
    the B tokens in the first layer. cache: (L, blocks, P, width of an entry); new entries are written to it. experts:
    for "mla_pass", (layers with experts, B, experts per token) int64, an output.
    """
    (B, D), (shift, table_width) = x.shape, block_layout(pages)
    tensors = dict(x=x, rope=rope, last=last, cache=cache, block_tables=pages.block_tables, seq_index=pages.seq_index)
    if experts is not None:
        tensors["experts"] = experts
    sizes = dict(L=len(layers), B=B, D=D, shift=shift, table_width=table_width, layer_stride=cache.stride(0))
    arguments = _PASSES[kernel](
        layers=ctypes.addressof(layers),
        **{name: address(tensor) for name, tensor in tensors.items()},
        **sizes,
        **numbers,
        threads=torch.get_num_threads(),
    )
    run(kernel, arguments, *([] if experts is None else [cache.dtype == torch.bfloat16]))


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
