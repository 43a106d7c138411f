"""Bookkeeping of the blocks of the KV cache: reference counts, prefix hashes, eviction order. Contains no tensors.

A block of BLOCK_SIZE tokens is free, referenced by one or more sequences, or cached: unreferenced, but available for
cache hits. The key of a full block is a hash of its tokens and of the hash of the previous block, so that a hash
identifies an entire prefix; a hit also compares the tokens. The chain of hashes starts from the weights version and
the cache salt, so that no blocks are shared between versions or tenants.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from thinkstack.types import ConfigError

BLOCK_SIZE = 64
"""Number of tokens per block; only full blocks can be cache hits."""
NULL_BLOCK = 0
"""Index of the block for padding tokens; it is never allocated."""


@dataclass(frozen=True)
class BlockTokens:
    """The tokens of a full block and the hash of the block before it."""

    parent_hash: bytes
    """Hash of the previous block, or `root_hash` for the first block."""
    tokens: bytes
    """BLOCK_SIZE token ids, int64, as bytes."""

    @property
    def block_hash(self) -> bytes:
        """Hash of this block and all blocks before it (blake2b, 128 bits)."""
        return hashlib.blake2b(self.parent_hash + self.tokens, digest_size=16).digest()


def root_hash(version: int, cache_salt: str = "") -> bytes:
    """The parent hash of the first block of every sequence with this weights version and cache salt."""
    return hashlib.blake2b(f"{version}\0{cache_salt}".encode(), digest_size=16).digest()


class BlockPool:
    """All blocks of a cache except NULL_BLOCK. Every block is in exactly one state: free, referenced or cached."""

    def __init__(self, num_blocks: int, enable_caching: bool = True):
        """num_blocks: number of usable blocks, numbered from 1. enable_caching: reuse blocks of equal prefixes."""
        if num_blocks < 1:
            raise ConfigError(
                f"a cache of {num_blocks} blocks is too small; it needs at least 1 block of {BLOCK_SIZE} tokens"
            )
        self.num_blocks, self.enable_caching = num_blocks, enable_caching
        self.free_blocks = deque(range(1, num_blocks + 1))
        self.cached_blocks: OrderedDict[int, None] = OrderedDict()
        """Cached blocks, least recently used first."""
        self.ref_count = numpy.zeros(num_blocks + 1, dtype=numpy.int32)
        self.block_tokens: dict[int, BlockTokens] = {}
        self.block_of_hash: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks that `allocate` can return: free blocks, and cached blocks, which it evicts."""
        return len(self.free_blocks) + len(self.cached_blocks)

    def allocate(self, count: int) -> list[int]:
        """Return `count` empty blocks with one reference each; evicts least recently used cached blocks if needed."""
        assert count <= self.num_free_blocks, "the scheduler requests only available blocks"
        found = []
        for _ in range(count):
            if self.free_blocks:
                block = self.free_blocks.popleft()
            else:
                block, _ = self.cached_blocks.popitem(last=False)
                self.evict(block)
            self.ref_count[block] = 1
            found.append(block)
        return found

    def add_reference(self, blocks: Sequence[int]) -> None:
        """Add a reference to each of these blocks."""
        for block in blocks:
            if self.ref_count[block] == 0:
                del self.cached_blocks[block]
            self.ref_count[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block of a sequence, given in order; later blocks are evicted first."""
        for block in reversed(blocks):
            self.ref_count[block] -= 1
            assert self.ref_count[block] >= 0, f"block {block} freed more often than it was referenced"
            if self.ref_count[block] == 0:
                if block in self.block_tokens:
                    self.cached_blocks[block] = None
                else:
                    self.free_blocks.append(block)

    def cache_block(self, block: int, content: BlockTokens) -> bytes:
        """Register a full block under its hash, unless this hash is already registered; returns the hash."""
        block_hash = content.block_hash
        if self.enable_caching and block_hash not in self.block_of_hash and block not in self.block_tokens:
            self.block_of_hash[block_hash] = block
            self.block_tokens[block] = content
        return block_hash

    def find_cached(self, content: BlockTokens) -> int | None:
        """The block with these tokens after the same prefix, or None."""
        block = self.block_of_hash.get(content.block_hash)
        return block if block is not None and self.block_tokens[block] == content else None

    def evict(self, block: int) -> None:
        """Remove a block's tokens and hash."""
        content = self.block_tokens.pop(block, None)
        if content is not None:
            del self.block_of_hash[content.block_hash]

    def reset_prefix_cache(self) -> None:
        """Evict all cached blocks and remove the hashes of referenced blocks."""
        for block in list(self.block_tokens):
            self.evict(block)
        self.free_blocks.extend(self.cached_blocks)
        self.cached_blocks.clear()

    def check_invariants(self) -> None:
        """Raise AssertionError if a block is lost, in two states, or registered under a wrong hash."""
        held = {int(block) for block in numpy.flatnonzero(self.ref_count)}
        free, cached = set(self.free_blocks), set(self.cached_blocks)
        assert len(free) == len(self.free_blocks), "a block is free twice"
        assert free | held | cached == set(range(1, self.num_blocks + 1)), "a block is lost"
        assert len(free) + len(held) + len(cached) == self.num_blocks, "a block is in two states"
        assert cached <= self.block_tokens.keys() and not free & self.block_tokens.keys()
        assert {content.block_hash: block for block, content in self.block_tokens.items()} == self.block_of_hash
