"""Where generations keep their context: one slot of equal length per sequence, whatever the attention caches.

MLA keeps a latent and a rotated key per token, GQA keys and values; both arrive here as entries of a fixed width.
Sequences that are being decoded occupy slots 0, 1, 2, ... without gaps, so reading them copies nothing.
"""

# Shapes in this file: L layers, B rows, T new tokens, S tokens attended to, W cache width.

from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from thinkstack.models.config import ModelConfig


class KVCache:
    """Entries of every layer, (L, slots, max_tokens, W). A slot's content counts up to its sequence's length only."""

    def __init__(
        self, cfg: ModelConfig, num_slots: int, max_tokens: int, dtype: torch.dtype, device: torch.device | None = None
    ):
        shape = (cfg.num_layers, num_slots, max_tokens, cfg.attention.cache_width)
        if device is not None and device.type != "cpu":
            self.data = torch.zeros(shape, dtype=dtype, device=device)
            return
        # numpy's zeros take no memory until written; zeros, not garbage: a masked NaN would still be NaN
        kind = numpy.float32 if dtype == torch.float32 else numpy.uint16
        self.data = torch.from_numpy(numpy.zeros(shape, dtype=kind)).view(dtype)

    def copy(self, source: int, targets: list[int], length: int) -> None:
        """Give the first `length` tokens of slot `source` to all `targets`."""
        self.data[:, targets, :length] = self.data[:, source : source + 1, :length]


@dataclass
class Prefill:
    """A view for whole prompts: row b goes to slot slots[b], tokens attend among themselves."""

    cache: KVCache
    slots: Tensor

    def extend(self, layer: int, entries: Tensor) -> None:
        self.cache.data[layer, self.slots, : entries.shape[1]] = entries

    def room(self, layer: int, rows: int) -> None:
        """Prompts attend among themselves."""


@dataclass
class Decode:
    """A view for one new token in each of slots 0..B-1, at positions[b]; reads back the first `span` tokens."""

    cache: KVCache
    positions: Tensor
    span: int

    def extend(self, layer: int, entries: Tensor) -> Tensor:
        rows = entries.shape[0]
        self.cache.data[layer, torch.arange(rows, device=self.positions.device), self.positions] = entries.squeeze(1)
        return self.cache.data[layer, :rows, : self.span]

    def room(self, layer: int, rows: int) -> Tensor:
        return self.cache.data[layer, :rows, : self.span]
