"""Blocks of the cache: who holds which, what is in them, and which come free first. Numbers only, no tensors.

A block of BLOCK tokens is free, held by one or more sequences, or cached: held by nobody, its content still known.
Content is named by a hash over everything before it, so a name stands for a whole prefix; what a name promises is
compared token by token before it is used. Names start from a root that holds the weights' version and the tenant's
salt: other weights and other tenants never meet.
"""

import hashlib
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from thinkstack.types import ConfigError

BLOCK = 64
"""Tokens of a block: also the unit in which cache hits are billed."""
NULL_BLOCK = 0
"""The block that no sequence gets: padding is written there."""


@dataclass(frozen=True)
class BlockTokens:
    """What a full block holds."""

    parent_hash: bytes
    """Name of the block before it, or the root."""
    tokens: bytes
    """Its BLOCK token ids as int64."""

    @property
    def block_hash(self) -> bytes:
        """Stands for this block and all before it (blake2b, 128 bits)."""
        return hashlib.blake2b(self.parent_hash + self.tokens, digest_size=16).digest()


def root_hash(version: int, cache_salt: str = "") -> bytes:
    """Parent of the first block of every sequence under these weights and of this tenant."""
    return hashlib.blake2b(f"{version}\0{cache_salt}".encode(), digest_size=16).digest()


class BlockPool:
    """All blocks of a cache but the spare one. free + held + cached = all, always."""

    def __init__(self, num_blocks: int, enable_caching: bool = True):
        """num_blocks: usable ones; they are numbered from 1. finds: whether blocks are used again for their content."""
        if num_blocks < 1:
            raise ConfigError(f"a cache of {num_blocks} blocks holds nothing; it needs at least 1 of {BLOCK} tokens")
        self.num_blocks, self.enable_caching = num_blocks, enable_caching
        self.free_blocks = deque(range(1, num_blocks + 1))
        self.cached_blocks: OrderedDict[int, None] = OrderedDict()
        """Blocks that nobody holds and whose content is known, the longest unused first."""
        self.ref_count = numpy.zeros(num_blocks + 1, dtype=numpy.int32)
        self.content: dict[int, BlockTokens] = {}
        self.block_of_hash: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Blocks that `take` could give."""
        return len(self.free_blocks) + len(self.cached_blocks)

    def allocate(self, count: int) -> list[int]:
        """Hold `count` blocks of no content; the longest unused cached ones are emptied once no free one is left."""
        assert count <= self.num_free_blocks, "the scheduler asks only for what is there"
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
        """Hold these blocks once more."""
        for block in blocks:
            if self.ref_count[block] == 0:
                del self.cached_blocks[block]
            self.ref_count[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, given in its order; its last ones are emptied first, later on."""
        for block in reversed(blocks):
            self.ref_count[block] -= 1
            assert self.ref_count[block] >= 0, f"block {block} released more often than held"
            if self.ref_count[block] == 0:
                if block in self.content:
                    self.cached_blocks[block] = None
                else:
                    self.free_blocks.append(block)

    def cache_block(self, block: int, content: BlockTokens) -> bytes:
        """Make a held block findable by what it holds, unless another one already is; returns the content's name."""
        name = content.block_hash
        if self.enable_caching and name not in self.block_of_hash and block not in self.content:
            self.block_of_hash[name] = block
            self.content[block] = content
        return name

    def find_cached(self, content: BlockTokens) -> int | None:
        """The block that holds this after this prefix, if there is one."""
        block = self.block_of_hash.get(content.block_hash)
        return block if block is not None and self.content[block] == content else None

    def evict(self, block: int) -> None:
        """Drop what is known of a block's content."""
        content = self.content.pop(block, None)
        if content is not None:
            del self.block_of_hash[content.block_hash]

    def reset_prefix_cache(self) -> None:
        """Empty all cached blocks, and take the names from the held ones."""
        for block in list(self.content):
            self.evict(block)
        self.free_blocks.extend(self.cached_blocks)
        self.cached_blocks.clear()

    def check_invariants(self) -> None:
        """Raise AssertionError if a block is lost, held and free, or findable under a name that is not its own."""
        held = {int(block) for block in numpy.flatnonzero(self.ref_count)}
        free, cached = set(self.free_blocks), set(self.cached_blocks)
        assert len(free) == len(self.free_blocks), "a block is free twice"
        assert free | held | cached == set(range(1, self.num_blocks + 1)), "a block is lost"
        assert len(free) + len(held) + len(cached) == self.num_blocks, "a block is in two states"
        assert cached <= self.content.keys() and not free & self.content.keys()
        assert {content.block_hash: block for block, content in self.content.items()} == self.block_of_hash
