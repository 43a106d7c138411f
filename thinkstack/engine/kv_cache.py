"""The paged KV cache: blocks of fixed-width entries.

An entry is the cached data of a token in a layer: a latent and a rotated key for MLA, keys and values for GQA.
"""

# Shapes in this file: L layers, N new tokens, P = BLOCK_SIZE tokens of a block, W width of an entry, K experts per
# token.

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor

from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.kernels.memory import zeros
from thinkstack.kernels.paging import Pages
from thinkstack.models.config import ModelConfig


class KVCache:
    """Entries of all layers, (L, blocks, P, W), and optionally the routed experts of each cached token."""

    def __init__(
        self,
        cfg: ModelConfig,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        experts: tuple[int, int, str] | None = None,
        drafts: bool = False,
    ):
        """num_blocks: number of blocks, including NULL_BLOCK. experts: (number of MoE layers, experts per token,
        integer type), to store routed experts. drafts: whether to add a layer for the first multi-token-prediction
        module."""
        shape = (cfg.num_layers + drafts, num_blocks, BLOCK_SIZE, cfg.attention.cache_width)
        self.data = zeros(shape, dtype, device)
        self.experts: numpy.ndarray | None = None
        if experts is not None:
            self.experts = numpy.zeros((num_blocks, BLOCK_SIZE, *experts[:2]), dtype=experts[2])

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` tokens of block `source` to block `target`."""
        self.data[:, target, :count] = self.data[:, source, :count]
        if self.experts is not None:
            self.experts[target, :count] = self.experts[source, :count]

    def store_routed_experts(self, slots: numpy.ndarray, chosen: numpy.ndarray) -> None:
        """Store the experts (N, L, K) of the tokens in slots (N,): block * P + offset in the block."""
        assert self.experts is not None
        self.experts.reshape(-1, *self.experts.shape[2:])[slots] = chosen

    def routed_experts_of(self, blocks: Sequence[int], count: int) -> Tensor | None:
        """Experts (count, L, K) of the first `count` tokens in these blocks; None if they are not stored."""
        if self.experts is None:
            return None
        found = self.experts[list(blocks)]
        return torch.from_numpy(found.reshape(-1, *found.shape[2:])[:count].copy())


class KVCacheView:
    """The cache during one forward pass: where the entries of N new tokens are written, and what the tokens read."""

    def __init__(self, cache: KVCache, pages: Pages, slots: Tensor):
        """pages: pages of the first layer. slots: (N,) int64, block * P + offset in the block."""
        self.cache, self.first, self.slots = cache, pages, slots

    def extend(self, layer: int, entries: Tensor) -> Pages:
        """Write the entries (N, 1, W) of the new tokens; returns the pages of this layer."""
        found = self.first._replace(entries=self.cache.data[layer])
        found.entries.view(-1, found.entries.shape[2]).index_copy_(0, self.slots, entries.squeeze(1))
        return found
