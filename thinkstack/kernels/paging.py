"""The paged KV cache in the format of the attention kernels: entries in blocks, a block table per sequence, and the
positions of keys and values in an entry."""

# Shapes in this file: N new tokens, R sequences, M blocks of the longest sequence, P tokens per block, W entry width,
# B rows, S tokens, G key/value heads, V value width.

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


class KVLayout(NamedTuple):
    """The positions of a token's keys and values in its cache entry."""

    groups: int
    """G, the number of key/value heads."""
    key_width: int
    """Width of a key in the entry, without a part that all heads share."""
    key_step: int
    """The key of head g starts at g * key_step."""
    value_at: int
    value_step: int
    """The value of head g starts at value_at + g * value_step."""
    value_width: int
    """V."""

    def split(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (B, S, G, key_width) and values (B, S, G, V) in entries (B, S, W), as views."""
        if self.groups == 1:
            return entries[..., None, : self.key_width], entries[..., None, self.value_at :][..., : self.value_width]
        if self.value_at < self.key_step:  # each head's key is followed by its value
            layout = entries.unflatten(-1, (self.groups, -1))
            return layout[..., : self.key_width], layout[..., self.value_at :]
        keys, values = entries.split([self.value_at, entries.shape[-1] - self.value_at], -1)
        return keys.unflatten(-1, (self.groups, -1)), values.unflatten(-1, (self.groups, -1))
