"""Which tokens of packed rows attend to each other: causally, within a document, and not to other branches."""

# Shapes in this file: B rows, T tokens.

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass(kw_only=True)
class PackedMask:
    """The mask of packed rows, common to all attention layers of a forward pass."""

    kv_range: Tensor
    """The earlier tokens that each token attends to, (B or 1, T, 3) int32, from `kv_range_of`."""
    block_mask: BlockMask | None = None
    """The mask of FlexAttention; None if FlexAttention is not used."""
    cached_mask: Tensor | None = None
    """The result of the first call of `additive`."""

    def additive(self, dtype: torch.dtype) -> Tensor:
        """The additive mask, (B or 1, 1, T, T): 0 = attended, -inf = masked."""
        if self.cached_mask is None:
            self.cached_mask = additive_mask(self.kv_range, dtype)
        return self.cached_mask


def additive_mask(kv_range: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (B or 1, 1, T, T): 0 = attended, -inf = masked. kv_range: (B or 1, T, 3)."""
    tokens = torch.arange(kv_range.shape[1], device=kv_range.device)
    first, hidden_from, hidden_to = kv_range.unsqueeze(-2).unbind(-1)  # (B or 1, T, 1) each
    masked = (tokens < first) | (tokens > tokens.unsqueeze(-1)) | ((tokens >= hidden_from) & (tokens < hidden_to))
    return torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill_(masked, -torch.inf).unsqueeze(1)


def run_starts(*ids: Tensor) -> Tensor:
    """The first index of the run of each token, (B, T). A run ends where any of `ids`, (B, T) each, changes."""
    changes = torch.stack([each[:, 1:] != each[:, :-1] for each in ids]).any(0)
    return torch.where(F.pad(changes, (1, 0)), torch.arange(ids[0].shape[1], device=ids[0].device), 0).cummax(1).values


def kv_range_of(document_ids: Tensor, branches: Tensor | None = None) -> Tensor:
    """The earlier tokens in the row that each token attends to, (B, T, 3) int32: the index of the first token, and a
    hidden interval (from, to), which is empty if both are equal.

    document_ids: (B, T); a document is a run of equal ids. branches: (B, T); within a document, 0 for the shared
    prompt, then 1, 2, ... for branches, which do not attend to each other. None: documents have no branches."""
    first = run_starts(document_ids)
    if branches is None:
        return torch.stack((first, first, first), -1).int()
    is_shared, places = branches == 0, torch.arange(first.shape[1], device=first.device)
    shared_end = torch.where(is_shared, places + 1, first).cummax(1).values
    hidden = torch.stack((shared_end, run_starts(document_ids, branches)), -1)
    hidden = torch.where(is_shared.unsqueeze(-1), first.unsqueeze(-1), hidden)
    return torch.cat((first.unsqueeze(-1), hidden), -1).int()


def document_block_mask(kv_range: Tensor) -> BlockMask:
    """The block mask for FlexAttention: causal, and restricted to kv_range (B or 1, T, 3)."""
    rows, T, _ = kv_range.shape
    first, hidden_from, hidden_to = kv_range.unbind(-1)

    def is_attended(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_hidden = (key >= hidden_from[row, query]) & (key < hidden_to[row, query])
        return (key <= query) & (key >= first[row, query]) & ~is_hidden

    return create_block_mask(is_attended, rows if rows > 1 else None, None, T, T, device=kv_range.device)
