"""Cached context as attention reads it: entries in blocks, and which blocks are whose."""

# Shapes in this file: N new tokens, R sequences, M blocks of the longest one, P tokens of a block, W width of an entry.

from typing import NamedTuple

from torch import Tensor


class Pages(NamedTuple):
    """The context of some new tokens in one layer; their own entries are in it."""

    entries: Tensor
    """(blocks, P, W), contiguous; P is a power of 2."""
    block_tables: Tensor
    """The blocks of each sequence in order, (R, M) int32."""
    seq_index: Tensor
    """The sequence of each new token, (N,) int32; tokens of one sequence lie together."""
    longest_run: int = 0
    """Most new tokens of one sequence; 0 where nobody has counted."""

    def of(self, sequences: Tensor, span: int) -> Tensor:
        """The first `span` tokens of some sequences (B,), copied: (B, span, W)."""
        blocks = self.block_tables[sequences, : -(-span // self.entries.shape[1])]
        return self.entries[blocks.long()].flatten(1, 2)[:, :span]
