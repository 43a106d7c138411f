"""Triton kernels for CUDA devices; each operation also has an implementation in torch for use without Triton.

The kernels are registered as torch operators with shape functions, so that a model can be traced without a device.
"""

import functools
import importlib.util

import torch
from torch import Tensor, library

from thinkstack.kernels import KVLayout
from thinkstack.kernels.paging import Pages

SMALL_M = 64
"""Maximum number of rows for matmuls with 8-bit matrices, which are bound by the time to read the weights."""


@functools.cache
def available() -> bool:
    """Whether Triton is installed; torch's CUDA packages depend on it."""
    return importlib.util.find_spec("triton") is not None


def is_device(x: Tensor) -> bool:
    """Whether x is on a CUDA device, or on the meta device, where tests trace the CUDA implementation."""
    return x.is_cuda or x.is_meta


def takes(x: Tensor) -> bool:
    """Whether the kernels support tensors like x."""
    return is_device(x) and available()


def paged_attention(query: Tensor, pages: Pages, last: Tensor, layout: KVLayout, scale: float) -> Tensor:
    """Attention of new tokens over the cached entries of their sequences; same interface as `kernels.paged_attention`.

    query: (N, G, Q, key_width). pages: pages of the N tokens. last: (N,) int64, increasing within a sequence. Returns
    (N, G, Q, V).
    """
    return torch.ops.thinkstack.paged_attention(query, *pages, last, list(layout), scale)


def _paged_attention(query, entries, block_tables, seq_index, longest_run, last, layout, scale):  # type: ignore[no-untyped-def]
    from thinkstack.kernels.triton.attention import paged_attention

    return paged_attention(query, Pages(entries, block_tables, seq_index, longest_run), last, KVLayout(*layout), scale)


def _paged_attention_shapes(query, entries, block_tables, seq_index, longest_run, last, layout, scale):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:3], KVLayout(*layout).value_width)


def takes_quantized(x: Tensor, qweight: Tensor) -> bool:
    """Whether to use `quantized_linear` for x (..., K) and qweight (N, K): inference, bf16, at most SMALL_M rows; int8
    on all devices, e4m3 from Ada (compute capability 8.9) on."""
    if not takes(x) or x.dtype != torch.bfloat16 or x.numel() > SMALL_M * x.shape[-1] or torch.is_grad_enabled():
        return False
    if qweight.dtype == torch.float8_e4m3fn:
        return x.is_meta or torch.cuda.get_device_capability(x.device) >= (8, 9)
    return qweight.dtype == torch.int8


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
