"""Triton kernels for CUDA devices; each operation also has an implementation in torch for use without Triton.

The kernels are registered as torch operators with shape functions, so that a model can be traced without a device.
"""

import functools
import importlib.util

import torch
from torch import Tensor, library

from thinkstack.kernels.paging import KVLayout, Pages


@functools.cache
def available() -> bool:
    """Whether Triton is installed; torch's CUDA packages depend on it."""
    return importlib.util.find_spec("triton") is not None


def paged_attention(query: Tensor, pages: Pages, last: Tensor, layout: KVLayout, scale: float) -> Tensor:
    """As `ops.paged_attend`; `last` increases within a sequence."""
    return torch.ops.thinkstack.paged_attention(query, *pages, last, list(layout), scale)


def _paged_attention(query, entries, block_tables, seq_index, longest_run, last, layout, scale):  # type: ignore[no-untyped-def]
    from thinkstack.kernels.triton.attention import paged_attention

    return paged_attention(query, Pages(entries, block_tables, seq_index, longest_run), last, KVLayout(*layout), scale)


def _paged_attention_shapes(query, entries, block_tables, seq_index, longest_run, last, layout, scale):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:3], KVLayout(*layout).value_width)


def quantized_linear(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """Multiply x (..., K) by the transpose of the dequantized qweight (N, K): (..., N). Scales are per row for int8,
    per 128 x 128 block for e4m3."""
    return torch.ops.thinkstack.quantized_linear(x.flatten(0, -2), qweight, scale).unflatten(0, x.shape[:-1])


def _quantized_linear(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    from thinkstack.kernels.triton.linear import quantized_linear

    block = (1, qweight.shape[1]) if qweight.dtype == torch.int8 else (128, 128)
    return quantized_linear(x, qweight, scale, block)


def _quantized_linear_shapes(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(len(x), len(qweight))


_operators = library.Library("thinkstack", "FRAGMENT")
_operators.define(
    "paged_attention(Tensor query, Tensor entries, Tensor block_tables, Tensor seq_index, int longest_run, "
    "Tensor last, int[] layout, float scale) -> Tensor"
)
_operators.impl("paged_attention", _paged_attention, "CUDA")
_operators.impl("paged_attention", _paged_attention_shapes, "Meta")
_operators.define("quantized_linear(Tensor x, Tensor qweight, Tensor scale) -> Tensor")
_operators.impl("quantized_linear", _quantized_linear, "CUDA")
_operators.impl("quantized_linear", _quantized_linear_shapes, "Meta")
