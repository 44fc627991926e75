"""Which block of KV lies in which slot of host memory: the second tier's books. Holds no memory itself.

Slots are found by content, as in the prefix index: by a hash chained over all tokens before, and a match compares the
tokens themselves. So blocks that requests share are kept once, and what a finished request leaves is a prefix cache.

    reserve: FREE or evicted -> WRITING (pinned by the copy)     written: WRITING -> CLEAN     drop: any -> LOST

CLEAN entries that nobody pins may be evicted, the least recently used first. A LOST entry is found no more; its slot is
free as soon as nobody pins it, for whoever does may still be reading there.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class HostEntry:
    """One slot's content: the tokens of a block, after those of its parent."""

    slot: int
    hash: bytes
    parent: bytes
    """Hash of the block before; empty for a first block."""
    tokens: bytes
    salt: str
    clean: bool = False
    """Whether the copy is complete."""
    pins: int = 0
    lost: bool = False
    """Dropped or evicted: not to be used any more."""


class HostIndex:
    """Entries of `num_slots` slots."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._by_hash: dict[bytes, HostEntry] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        self._dropped: set[HostEntry] = set()
        """Lost entries that are still pinned."""
        self.evictions = 0

    @property
    def num_available(self) -> int:
        """Slots a reservation may take: free ones, and those of entries that may be evicted."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Entries that may be evicted."""
        return len(self._idle)

    @property
    def num_entries(self) -> int:
        return len(self._by_hash)

    def find(self, key: bytes, parent: bytes, tokens: bytes, salt: str) -> HostEntry | None:
        """The entry of exactly this block, complete or still being written."""
        entry = self._by_hash.get(key)
        if entry is None or entry.parent != parent or entry.salt != salt or entry.tokens != tokens:
            return None
        return entry

    def holds(self, key: bytes) -> bool:
        """Whether there is a complete copy of the block of this hash; for statistics: tokens are not compared."""
        entry = self._by_hash.get(key)
        return entry is not None and entry.clean

    def reserve(self, key: bytes, parent: bytes, tokens: bytes, salt: str) -> HostEntry | None:
        """A slot for a block that is to be written, pinned once; None when every slot is pinned, or the key taken."""
        if key in self._by_hash:
            return None
        if self._free:
            slot = self._free.pop()
        elif self._idle:
            evicted, _ = self._idle.popitem(last=False)
            entry = self._by_hash.pop(evicted)
            entry.lost, slot = True, entry.slot
            self.evictions += 1
        else:
            return None
        made = self._by_hash[key] = HostEntry(slot, key, parent, tokens, salt, pins=1)
        return made

    def written(self, entry: HostEntry) -> None:
        """The copy is complete; its pin is given back."""
        entry.clean = True
        self.unpin(entry)

    def drop(self, entry: HostEntry) -> None:
        """The copy that had a pin of it failed: that pin is given back, and nobody finds the entry any more."""
        if not entry.lost:
            del self._by_hash[entry.hash]
            entry.lost = True
            self._dropped.add(entry)
        self.unpin(entry)

    def pin(self, entry: HostEntry) -> None:
        """Keep an entry until it is unpinned as often."""
        if entry.pins == 0:
            del self._idle[entry.hash]
        entry.pins += 1

    def unpin(self, entry: HostEntry) -> None:
        """One pin less; an entry without pins may be evicted."""
        entry.pins -= 1
        if entry.pins:
            return
        if entry.lost:
            self._dropped.remove(entry)
            self._free.append(entry.slot)
        else:
            self._idle[entry.hash] = None

    def check(self) -> None:
        """Raise AssertionError unless every slot is in exactly one place."""
        slots = [entry.slot for entry in (*self._by_hash.values(), *self._dropped)]
        assert sorted(self._free + slots) == list(range(self.num_slots)), "slots are lost or used twice"
        idle = {entry.hash for entry in self._by_hash.values() if entry.pins == 0}
        assert idle == set(self._idle), "idle entries and pins disagree"
        assert all(entry.clean or entry.pins for entry in self._by_hash.values()), "an incomplete entry has no copy"
        assert not any(entry.lost for entry in self._by_hash.values()), "a lost entry is indexed"
