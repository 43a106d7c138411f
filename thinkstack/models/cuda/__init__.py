"""Triton kernels for CUDA devices; each has a counterpart in torch's operators, which runs where Triton is missing.

They are operators of torch too, with shapes, so that a model can be traced without a device.
"""

import functools
import importlib.util

import torch
from torch import Tensor, library

from thinkstack.models.kernels import Heads
from thinkstack.models.pages import Pages


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


def read_cache(query: Tensor, pages: Pages, last: Tensor, heads: Heads, scale: float) -> Tensor:
    """Attention of new tokens over the cached entries of their sequences, as `read_cache` of models/kernels.

    query: (N, G, Q, key_width). pages: of N tokens. last: (N,) int64, counting up within a sequence. Returns (N, G, Q,
    V).
    """
    return torch.ops.thinkstack.read_cache(query, *pages, last, list(heads), scale)


def _read_cache(query, entries, tables, owner, longest_run, last, heads, scale):  # type: ignore[no-untyped-def]
    from thinkstack.models.cuda.paged import read_cache

    return read_cache(query, Pages(entries, tables, owner, longest_run), last, Heads(*heads), scale)


def _read_cache_shapes(query, entries, tables, owner, longest_run, last, heads, scale):  # type: ignore[no-untyped-def]
    return query.new_empty(*query.shape[:3], Heads(*heads).value_width)


_operators = library.Library("thinkstack", "FRAGMENT")
_operators.define(
    "read_cache(Tensor query, Tensor entries, Tensor tables, Tensor owner, int longest_run, Tensor last, int[] heads, "
    "float scale) -> Tensor"
)
_operators.impl("read_cache", _read_cache, "CUDA")
_operators.impl("read_cache", _read_cache_shapes, "Meta")
