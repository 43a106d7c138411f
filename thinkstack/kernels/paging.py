"""The paged KV cache in the format of the attention kernels: entries in blocks, and a block table per sequence."""

# Shapes in this file: N new tokens, R sequences, M blocks of the longest sequence, P tokens per block, W entry width.

from typing import NamedTuple

from torch import Tensor


class Pages(NamedTuple):
    """The context of new tokens in one layer, entries of the new tokens included."""

    entries: Tensor
    """Cache entries (blocks, P, W), contiguous; P is a power of 2."""
    block_tables: Tensor
    """The blocks of each sequence in order, (R, M) int32."""
    seq_index: Tensor
    """The sequence of each new token, (N,) int32; tokens of one sequence are adjacent."""
    longest_run: int = 0
    """Maximum number of new tokens of one sequence; 0: unknown."""

    def of(self, sequences: Tensor, span: int) -> Tensor:
        """A copy of the first `span` tokens of the given sequences (B,): (B, span, W)."""
        blocks = self.block_tables[sequences, : -(-span // self.entries.shape[1])]
        return self.entries[blocks.long()].flatten(1, 2)[:, :span]
