"""The store of shared segments: which texts have KV of their own, wherever in a prompt they stand.

A segment's key is a hash of its tokens, those encoded before it and the tenant; hashes only find, tokens decide. Its
KV is in the segment memory (keys before rotation, fit for every place) and, while there is room, in device blocks,
which requests read in place. What is in here never is in the prefix index, nor the other way round: the KV of a
segment that was encoded alone is no prefix's.

Source: TokenDance (arXiv 2604.03143), 4.1, with tokens compared where it trusts a hash.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvarn.serving.rounds.segment import StoredSegment

if TYPE_CHECKING:
    from kvarn.serving.kvcache.cache import KVCache

Hash = Callable[[bytes], bytes]
_NOTHING: NDArray[np.int32] = np.empty(0, dtype=np.int32)


def _hash(content: bytes) -> bytes:
    return blake2b(content, digest_size=16).digest()


class SegmentStore:
    """Segments of one engine, in `capacity` blocks of segment memory; the least recently used go first."""

    def __init__(self, cache: KVCache, capacity: int, *, hash: Hash = _hash) -> None:
        self.cache = cache
        self.capacity = capacity
        self._hash = hash
        self._by_key: OrderedDict[bytes, StoredSegment] = OrderedDict()
        """Least recently used first."""
        self._by_block: dict[int, StoredSegment] = {}
        self._free = list(range(capacity - 1, -1, -1))
        self.hits = 0
        self.misses = 0

    def __contains__(self, block: int) -> bool:
        return block in self._by_block

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def used_blocks(self) -> int:
        """Of the segment memory."""
        return self.capacity - len(self._free)

    @property
    def num_tokens(self) -> int:
        return sum(segment.length for segment in self._by_key.values())

    def texts(self, salt: str) -> list[NDArray[np.int32]]:
        """The tokens of a tenant's encoded segments."""
        return [each.tokens for each in self._by_key.values() if each.salt == salt and each.is_encoded]

    def find(
        self, tokens: NDArray[np.int32], sink: NDArray[np.int32], salt: str, before: NDArray[np.int32] = _NOTHING
    ) -> StoredSegment | None:
        """The segment of these tokens behind this sink, of this tenant; `before`: see StoredSegment."""
        key = self._key(tokens, sink, salt, before)
        found = self._by_key.get(key)
        if found is None or not _is(found, tokens, sink, salt, before):
            return None
        self._by_key.move_to_end(key)
        return found

    def take(
        self, tokens: NDArray[np.int32], sink: NDArray[np.int32], salt: str, before: NDArray[np.int32] = _NOTHING
    ) -> StoredSegment | None:
        """The segment of these tokens, a new one if need be, with one more pin.

        None where there is no room for it, or other tokens have its key.
        """
        found = self.find(tokens, sink, salt, before)
        if found is not None:
            self.hits += 1
            self.pin(found)
            return found
        self.misses += 1
        key = self._key(tokens, sink, salt, before)
        needed = self.cache.blocks_for(len(sink) + len(tokens))
        if key in self._by_key or not self._make_room(needed):
            return None
        memory = [self._free.pop() for _ in range(needed)]
        segment = StoredSegment(key, salt, sink.copy(), tokens.copy(), before.copy(), canonical=memory)
        self._by_key[key] = segment
        self.pin(segment)
        return segment

    def pin(self, segment: StoredSegment) -> None:
        """Keep a segment, on the device too if it is there, until as many `unpin`."""
        segment.pins += 1
        self.cache.pool.acquire(segment.blocks)

    def unpin(self, segment: StoredSegment) -> None:
        segment.pins -= 1
        self.cache.pool.release(segment.blocks, keep=self.cache.keeps)
        if not segment.pins and not segment.is_encoded:
            self._remove(segment)  # nobody will go on with it

    def place(self, segment: StoredSegment) -> bool:
        """Give a pinned segment device blocks, without content, unless it has some; False where there are none."""
        if segment.blocks:
            return True
        blocks = self.cache.pool.allocate(len(segment.canonical))
        if blocks is None:
            return False
        segment.blocks = blocks
        for _ in range(segment.pins - 1):
            self.cache.pool.acquire(blocks)
        self._by_block.update(dict.fromkeys(blocks, segment))
        return True

    def displace(self, segment: StoredSegment) -> None:
        """Take back the device blocks of a pinned segment: they have not got its content."""
        for block in segment.blocks:
            del self._by_block[block]
        for _ in range(segment.pins):
            self.cache.pool.release(segment.blocks, keep=self.cache.keeps)
        segment.blocks = []

    def evicted(self, block: int) -> None:
        """A device block of a segment is given up: the others are of no use then."""
        segment = self._by_block[block]
        for other in segment.blocks:
            del self._by_block[other]
        rest = [other for other in segment.blocks if other != block]
        segment.blocks = []
        self.cache.pool.free_cached(rest)

    def held_blocks(self) -> list[int]:
        """Device blocks as often as pins hold them."""
        return [block for each in self._by_key.values() for _ in range(each.pins) for block in each.blocks]

    def check(self) -> None:
        """Raise AssertionError unless every block of the segment memory has one owner and the maps agree."""
        owned = [block for each in self._by_key.values() for block in each.canonical]
        assert sorted(owned + self._free) == list(range(self.capacity)), "blocks of the segment memory are lost"
        placed = {block: each for each in self._by_key.values() for block in each.blocks}
        assert placed == self._by_block, "device blocks of segments are lost"
        assert not any(block in self.cache.index for block in placed), "a segment's block is indexed as a prefix"
        assert all(each.pins >= 0 for each in self._by_key.values()), "a segment has been let go of twice"

    def _make_room(self, blocks: int) -> bool:
        if blocks > self.capacity:
            return False
        for segment in [each for each in self._by_key.values() if not each.pins]:
            if len(self._free) >= blocks:
                break
            self._remove(segment)
        return len(self._free) >= blocks

    def _remove(self, segment: StoredSegment) -> None:
        """Forget an unpinned segment."""
        del self._by_key[segment.key]
        self._free += segment.canonical
        for block in segment.blocks:
            del self._by_block[block]
        self.cache.pool.free_cached(segment.blocks)
        segment.blocks, segment.canonical = [], []

    def _key(self, tokens: NDArray[np.int32], sink: NDArray[np.int32], salt: str, before: NDArray[np.int32]) -> bytes:
        lengths = np.array([len(salt), len(before), len(sink)], dtype=np.int32).tobytes()
        texts = before.tobytes() + sink.tobytes() + tokens.tobytes()
        return self._hash(lengths + salt.encode("utf-8", "surrogatepass") + texts)


def _is(
    segment: StoredSegment, tokens: NDArray[np.int32], sink: NDArray[np.int32], salt: str, before: NDArray[np.int32]
) -> bool:
    return (
        segment.salt == salt
        and np.array_equal(segment.tokens, tokens)
        and np.array_equal(segment.sink_tokens, sink)
        and np.array_equal(segment.before, before)
    )
