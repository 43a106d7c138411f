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
SPARE = 0
"""The block that no sequence gets: padding is written there."""


@dataclass(frozen=True)
class Content:
    """What a full block holds."""

    parent: bytes
    """Name of the block before it, or the root."""
    tokens: bytes
    """Its BLOCK token ids as int64."""

    @property
    def name(self) -> bytes:
        """Stands for this block and all before it (blake2b, 128 bits)."""
        return hashlib.blake2b(self.parent + self.tokens, digest_size=16).digest()


def root_name(version: int, cache_salt: str = "") -> bytes:
    """Parent of the first block of every sequence under these weights and of this tenant."""
    return hashlib.blake2b(f"{version}\0{cache_salt}".encode(), digest_size=16).digest()


class BlockPool:
    """All blocks of a cache but the spare one. free + held + cached = all, always."""

    def __init__(self, num_blocks: int, finds: bool = True):
        """num_blocks: usable ones; they are numbered from 1. finds: whether blocks are used again for their content."""
        if num_blocks < 1:
            raise ConfigError(f"a cache of {num_blocks} blocks holds nothing; it needs at least 1 of {BLOCK} tokens")
        self.num_blocks, self.finds = num_blocks, finds
        self.free = deque(range(1, num_blocks + 1))
        self.cached: OrderedDict[int, None] = OrderedDict()
        """Blocks that nobody holds and whose content is known, the longest unused first."""
        self.holders = numpy.zeros(num_blocks + 1, dtype=numpy.int32)
        self.content: dict[int, Content] = {}
        self.by_name: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` could give."""
        return len(self.free) + len(self.cached)

    def take(self, count: int) -> list[int]:
        """Hold `count` blocks of no content; the longest unused cached ones are emptied once no free one is left."""
        assert count <= self.available, "the scheduler asks only for what is there"
        found = []
        for _ in range(count):
            if self.free:
                block = self.free.popleft()
            else:
                block, _ = self.cached.popitem(last=False)
                self.forget(block)
            self.holders[block] = 1
            found.append(block)
        return found

    def share(self, blocks: Sequence[int]) -> None:
        """Hold these blocks once more."""
        for block in blocks:
            if self.holders[block] == 0:
                del self.cached[block]
            self.holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Let go of a sequence's blocks, given in its order; its last ones are emptied first, later on."""
        for block in reversed(blocks):
            self.holders[block] -= 1
            assert self.holders[block] >= 0, f"block {block} released more often than held"
            if self.holders[block] == 0:
                if block in self.content:
                    self.cached[block] = None
                else:
                    self.free.append(block)

    def name(self, block: int, content: Content) -> bytes:
        """Make a held block findable by what it holds, unless another one already is; returns the content's name."""
        name = content.name
        if self.finds and name not in self.by_name and block not in self.content:
            self.by_name[name] = block
            self.content[block] = content
        return name

    def find(self, content: Content) -> int | None:
        """The block that holds this after this prefix, if there is one."""
        block = self.by_name.get(content.name)
        return block if block is not None and self.content[block] == content else None

    def forget(self, block: int) -> None:
        """Drop what is known of a block's content."""
        content = self.content.pop(block, None)
        if content is not None:
            del self.by_name[content.name]

    def forget_cached(self) -> None:
        """Empty all cached blocks, and take the names from the held ones."""
        for block in list(self.content):
            self.forget(block)
        self.free.extend(self.cached)
        self.cached.clear()

    def check(self) -> None:
        """Raise AssertionError if a block is lost, held and free, or findable under a name that is not its own."""
        held = {int(block) for block in numpy.flatnonzero(self.holders)}
        free, cached = set(self.free), set(self.cached)
        assert len(free) == len(self.free), "a block is free twice"
        assert free | held | cached == set(range(1, self.num_blocks + 1)), "a block is lost"
        assert len(free) + len(held) + len(cached) == self.num_blocks, "a block is in two states"
        assert cached <= self.content.keys() and not free & self.content.keys()
        assert {content.name: block for block, content in self.content.items()} == self.by_name
