"""Triton kernels for CUDA devices; each has a counterpart in torch's operators, which runs where Triton is missing.

They are operators of torch too, with shapes, so that a model can be traced without a device.
"""

import functools
import importlib.util

import torch
from torch import Tensor, library

from thinkstack.kernels import KVLayout
from thinkstack.kernels.paging import Pages

SMALL_M = 64
"""Rows that are few: their products with matrices in 8 bits take as long as reading the codes."""


@functools.cache
def available() -> bool:
    """Whether Triton is installed; torch's packages for CUDA bring it."""
    return importlib.util.find_spec("triton") is not None


def is_device(x: Tensor) -> bool:
    """Whether x lies on a CUDA device, or on none and only its shape counts: there the same is computed, for tests."""
    return x.is_cuda or x.is_meta


def takes(x: Tensor) -> bool:
    """Whether the kernels can work on tensors like x."""
    return is_device(x) and available()


def paged_attention(query: Tensor, pages: Pages, last: Tensor, heads: KVLayout, scale: float) -> Tensor:
    """Attention of new tokens over the cached entries of their sequences, as `paged_attention` of models/kernels.

    query: (N, G, Q, key_width). pages: of N tokens. last: (N,) int64, counting up within a sequence. Returns (N, G, Q,
    V).
    """
    return torch.ops.thinkstack.paged_attention(query, *pages, last, list(heads), scale)


def _read_cache(query, entries, block_tables, seq_index, longest_run, last, heads, scale):  # type: ignore[no-untyped-def]
    from thinkstack.kernels.triton.attention import paged_attention

    return paged_attention(query, Pages(entries, block_tables, seq_index, longest_run), last, KVLayout(*heads), scale)


def _read_cache_shapes(query, entries, block_tables, seq_index, longest_run, last, heads, scale):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:3], KVLayout(*heads).value_width)


def takes_quantized(x: Tensor, qweight: Tensor) -> bool:
    """Whether x (..., K) should be multiplied with codes (N, K) as they are read: inference on SMALL_M rows at most, in
    bf16, int8 anywhere and e4m3 from Ada on."""
    if not takes(x) or x.dtype != torch.bfloat16 or x.numel() > SMALL_M * x.shape[-1] or torch.is_grad_enabled():
        return False
    if qweight.dtype == torch.float8_e4m3fn:
        return x.is_meta or torch.cuda.get_device_capability(x.device) >= (8, 9)
    return qweight.dtype == torch.int8


def quantized_linear(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    """x (..., K) times the transpose of codes (N, K), each times its block's scale: (..., N). Blocks are rows for int8,
    128 x 128 for e4m3."""
    return torch.ops.thinkstack.quantized_linear(x.flatten(0, -2), qweight, scale).unflatten(0, x.shape[:-1])


def _packed_product(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    from thinkstack.kernels.triton.linear import product

    block = (1, qweight.shape[1]) if qweight.dtype == torch.int8 else (128, 128)
    return product(x, qweight, scale, block)


def _packed_product_shapes(x: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(len(x), len(qweight))


_operators = library.Library("thinkstack", "FRAGMENT")
_operators.define(
    "paged_attention(Tensor query, Tensor entries, Tensor block_tables, Tensor seq_index, int longest_run, "
    "Tensor last, int[] heads, float scale) -> Tensor"
)
_operators.impl("paged_attention", _read_cache, "CUDA")
_operators.impl("paged_attention", _read_cache_shapes, "Meta")
_operators.define("quantized_linear(Tensor x, Tensor codes, Tensor scale) -> Tensor")
_operators.impl("quantized_linear", _packed_product, "CUDA")
_operators.impl("quantized_linear", _packed_product_shapes, "Meta")
