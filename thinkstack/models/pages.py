"""Cached context as attention reads it: entries in blocks, and which blocks are whose."""

# Shapes in this file: N new tokens, R sequences, M blocks of the longest one, P tokens of a block, W width of an entry.

from typing import NamedTuple

from torch import Tensor


class Pages(NamedTuple):
    """The context of some new tokens in one layer; their own entries are in it."""

    entries: Tensor
    """(blocks, P, W), contiguous; P is a power of 2."""
    tables: Tensor
    """The blocks of each sequence in order, (R, M) int32."""
    owner: Tensor
    """The sequence of each new token, (N,) int32."""
    runs: tuple[tuple[int, int, int], ...]
    """Tokens of one sequence that follow each other: start, count and sequence, in order of their start."""

    def of(self, sequence: int | Tensor, span: int) -> Tensor:
        """The first `span` tokens of one sequence or of several, copied: (1 or their number, span, W)."""
        blocks = self.tables[sequence, : -(-span // self.entries.shape[1])]
        rows = blocks if blocks.dim() == 2 else blocks.unsqueeze(0)
        return self.entries[rows.long()].flatten(1, 2)[:, :span]
