"""Where generations keep their context: blocks of entries, whatever the attention caches.

MLA keeps a latent and a rotated key per token, GQA keys and values; both arrive here as entries of a fixed width.
"""

# Shapes in this file: L layers, N new tokens, P = BLOCK tokens of a block, W width of an entry, K experts per token.

import math
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from thinkstack.engine.block_pool import BLOCK
from thinkstack.kernels.paging import Pages
from thinkstack.models.config import ModelConfig

LINE = 64
"""Bytes that a processor's cache fetches at once."""


class KVCache:
    """Entries of every layer, (L, blocks, P, W), and the experts that each cached token used, where they are kept."""

    def __init__(
        self,
        cfg: ModelConfig,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        experts: tuple[int, int, str] | None = None,
        drafts: bool = False,
    ):
        """num_blocks: with the spare one. experts: layers that have some, experts per token and their integer type.
        drafts: keep a layer for the first multi-token-prediction module too.
        """
        shape = (cfg.num_layers + drafts, num_blocks, BLOCK, cfg.attention.cache_width)
        if device is not None and device.type != "cpu":
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        else:
            self.data = _zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        self.experts: numpy.ndarray | None = None
        if experts is not None:
            self.experts = numpy.zeros((num_blocks, BLOCK, *experts[:2]), dtype=experts[2])

    def copy(self, source: int, target: int, count: int) -> None:
        """Give the first `count` tokens of block `source` to block `target`."""
        self.data[:, target, :count] = self.data[:, source, :count]
        if self.experts is not None:
            self.experts[target, :count] = self.experts[source, :count]

    def store_routed_experts(self, slots: numpy.ndarray, chosen: numpy.ndarray) -> None:
        """Note the experts (N, L, K) of the tokens in slots (N,): block * P + place in it."""
        assert self.experts is not None
        self.experts.reshape(-1, *self.experts.shape[2:])[slots] = chosen

    def routed_experts_of(self, blocks: Sequence[int], count: int) -> Tensor | None:
        """Experts (count, L, K) of the first `count` tokens in these blocks; None where they are not kept."""
        if self.experts is None:
            return None
        found = self.experts[list(blocks)]
        return torch.from_numpy(found.reshape(-1, *found.shape[2:])[:count].copy())


def _zeros(size: int) -> Tensor:
    """So many bytes, from the beginning of a line of the processor's cache. numpy's zeros take no memory until they are
    written; zeros, not garbage: a masked NaN would still be NaN."""
    held = numpy.zeros(size + LINE, dtype=numpy.uint8)
    start = -held.ctypes.data % LINE
    return torch.from_numpy(held[start : start + size])


class KVCacheView:
    """A cache as one forward pass sees it: N new tokens, where their entries go, and what they read."""

    def __init__(self, cache: KVCache, pages: Pages, slots: Tensor):
        """pages: its entries are those of the first layer. slots: (N,) int64, block * P + place in it."""
        self.cache, self.first, self.slots = cache, pages, slots

    def extend(self, layer: int, entries: Tensor) -> Pages:
        """Keep entries (N, 1, W) of the new tokens; returns the context in this layer."""
        found = self.first._replace(entries=self.cache.data[layer])
        found.entries.view(-1, found.entries.shape[2]).index_copy_(0, self.slots, entries.squeeze(1))
        return found
