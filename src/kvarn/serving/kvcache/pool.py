"""The block pool: every KV block is free, active or cached, and this file is the only one that says which.

FREE    nobody's; its content means nothing
ACTIVE  referenced by one or more requests
CACHED  referenced by none, kept because the prefix index knows its content; the least recently used goes first

    allocate: FREE -> ACTIVE                       (or CACHED -> ACTIVE with new content, after eviction)
    acquire:  CACHED -> ACTIVE, ACTIVE -> ACTIVE   (one more reference to the same content)
    release:  ACTIVE -> ACTIVE | CACHED | FREE     (one reference less)
    free_cached: CACHED -> FREE
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable


class BlockState(enum.Enum):
    FREE = "free"
    ACTIVE = "active"
    CACHED = "cached"


class BlockPool:
    """Reference counts and states of `num_blocks` blocks. Holds no memory; ids index the executor's pages."""

    def __init__(self, num_blocks: int, on_evict: Callable[[int], None]) -> None:
        """`on_evict(block)` is called when a cached block's content is given up."""
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._on_evict = on_evict

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_active(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks an allocation may take: free ones, and cached ones after eviction."""
        return len(self._free) + len(self._cached)

    def state(self, block: int) -> BlockState:
        if self._references[block]:
            return BlockState.ACTIVE
        return BlockState.CACHED if block in self._cached else BlockState.FREE

    def references(self, block: int) -> int:
        return self._references[block]

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each and no content; None, and nothing changed, if there are too few."""
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._cached.popitem(last=False)
                self._on_evict(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """One more reference to each of these active or cached blocks."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: list[int], keep: Callable[[int], bool]) -> None:
        """One reference less to each; unreferenced ones become cached where `keep(block)`, else free.

        The last block of a chain is released first, so that eviction takes leaves before what they hang on.
        """
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if keep(block):
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def free_cached(self, blocks: Iterable[int]) -> None:
        """The content of cached blocks is worth nothing any more; others are left alone."""
        for block in blocks:
            if block in self._cached:
                del self._cached[block]
                self._free.append(block)

    def check(self) -> None:
        """Raise AssertionError unless every block is in exactly one state."""
        free, cached = set(self._free), set(self._cached)
        active = {block for block, references in enumerate(self._references) if references}
        assert min(self._references, default=0) >= 0, "negative reference count"
        assert len(free) == len(self._free), "a block is free twice"
        assert not (free & cached or free & active or cached & active), "a block is in two states"
        assert len(free) + len(cached) + len(active) == self.num_blocks, "blocks are lost"
