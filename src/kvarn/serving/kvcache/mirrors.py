"""What the members of finished rounds leave, in host memory: families of caches, each one master and its mirrors.

Caches come in as arrays of blocks and go out as views that `kvarn.kernels.ops.restore_blocks` takes, or dense; what
comes out has the bytes that came in, or is a miss. The store keeps to a limit in bytes: what is finished goes first,
mirrors before their masters, the longest unused before others; what is pinned stays. A master never goes under its
mirrors: one of them takes its place (`mirror_family.without_member`), at once or not at all.

Not thread-safe. Host memory and numpy alone: nothing here knows a model.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvarn.serving.kvcache import mirror_file
from kvarn.serving.kvcache.mirror_family import (
    Array,
    BlockKey,
    Family,
    Indices,
    MemberCache,
    blocks_of,
    dense_of,
    family_of,
    is_intact,
    materialised,
    ratio_of,
    with_member,
    without_member,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FamilyReport:
    """What a family takes after it was stored."""

    master: str
    stored_bytes: Mapping[str, int]
    ratios: Mapping[str, float]
    """How many times smaller each mirror is than its blocks."""


@dataclass(frozen=True, slots=True)
class MirrorView:
    """A member's cache as arguments of `restore_blocks`, which takes one layer of all blocks at a time.

    For layer l: master[:, l : l + 1], patches[:, None], sources[l], starts, targets, ..., pages[:, l : l + 1].
    The arrays are not to be changed, and stay as they are whatever becomes of the store.
    """

    keys: tuple[BlockKey, ...]
    master: Array
    """[M, L, 2, Hkv, B, D], the same object for all members of a family"""
    sources: Indices
    """[L, n]: a block of the master's, or ~ a patch's number"""
    patches: Array
    """[E, 2, Hkv, B, D], those of a layer together and in order of the layers"""
    facts: bytes


@dataclass(slots=True)
class _Use:
    """Of one member."""

    last: int
    pins: int = 0


class MirrorStore:
    """Families by name, members by name."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._families: dict[str, Family] = {}
        self._uses: dict[tuple[str, str], _Use] = {}
        self._finished: set[str] = set()
        self._clock = itertools.count()

    # ---- in ----------------------------------------------------------------------------------------------

    def store(self, family: str, members: Mapping[str, MemberCache]) -> FamilyReport | None:
        """Store what a round's members leave; None when there is no room for it.

        ValueError when the family is there already, or blocks are not what they should be or not of one shape.
        """
        if family in self._families or not members or any(cache.inherited for cache in members.values()):
            raise ValueError(
                f"family {family!r} is stored already or empty, or members inherit: add them one by one, or drop it"
            )
        return self._put(family, family_of({name: dense_of(cache) for name, cache in members.items()}))

    def add(self, family: str, member: str, cache: MemberCache) -> FamilyReport | None:
        """Store what a member leaves that comes late, or again: the newer takes the place of the older.

        A family that is not there begins with it. None when there is no room: the family is as it was. ValueError when
        its blocks do not fit the family's, for inherited ones that its master has not, or for a member that is pinned.
        """
        dense = dense_of(cache)
        before = self._families.get(family)
        if before is not None and member in before.members:
            self._check_unpinned(family, member)
            before = without_member(before, member)
        return self._put(family, with_member(before, member, dense, cache.inherited))

    # ---- out ---------------------------------------------------------------------------------------------

    def get(self, family: str, member: str, *, verify: bool = True) -> MirrorView | None:
        """A member's cache, or None when it is not there.

        `verify` reads all of it to see that its bytes are those that were stored (about a second for a gigabyte); a
        member of which some are not is dropped, and a miss.
        """
        found = self._found(family, member, verify)
        if found is None:
            return None
        blocks = found.dense.blocks
        if member != found.master:
            mirror = found.mirrors[member]
            return MirrorView(mirror.keys, blocks, mirror.sources, mirror.patches, mirror.facts)
        sources = np.repeat(np.arange(len(blocks), dtype=np.int32)[None], blocks.shape[1], axis=0)
        return MirrorView(found.dense.keys, blocks, sources, blocks[:0, 0], found.dense.facts)

    def materialise(self, family: str, member: str, *, verify: bool = True) -> MemberCache | None:
        """A member's cache as it was stored; None as for `get`."""
        found = self._found(family, member, verify)
        if found is None:
            return None
        dense = materialised(found, member)
        return MemberCache(dense.keys, dense.blocks, dense.facts)

    def blocks(self, family: str, member: str, keys: Sequence[BlockKey]) -> Array | None:
        """[n, L, 2, Hkv, B, D]: a member's blocks of these keys, unverified; None when it or one of them is missing."""
        found = self._found(family, member, verify=False)
        return None if found is None else blocks_of(found, member, keys)

    def __contains__(self, member: tuple[str, str]) -> bool:
        """Whether a member is there, given as family and member."""
        return member in self._uses

    def members_of(self, family: str) -> tuple[str, ...]:
        """The master first; none when the family is not there."""
        found = self._families.get(family)
        return () if found is None else found.members

    def keys(self, family: str, member: str) -> tuple[BlockKey, ...]:
        """Of a member's blocks. KeyError when it is not there."""
        found = self._families[family]
        return found.dense.keys if member == found.master else found.mirrors[member].keys

    def members(self) -> Iterator[tuple[str, str]]:
        """All of them, as family and member."""
        return iter(list(self._uses))

    # ---- lives -------------------------------------------------------------------------------------------

    def pin(self, family: str, member: str) -> None:
        """Keep a member until it is unpinned as often. KeyError when it is not there."""
        self._uses[family, member].pins += 1

    def unpin(self, family: str, member: str) -> None:
        """Undo one `pin`. ValueError when there is none. A member that was lost meanwhile has none to undo."""
        use = self._uses.get((family, member))
        if use is None:
            return
        if not use.pins:
            raise ValueError(f"{member!r} of {family!r} is not pinned")
        use.pins -= 1

    def finish(self, family: str) -> None:
        """The family's round is over and its next one has begun: it goes before others when room is wanted."""
        if family in self._families:
            self._finished.add(family)

    def drop(self, family: str, member: str) -> None:
        """Forget a member, if it is there. ValueError when it is pinned."""
        found = self._families.get(family)
        if found is not None and member in found.members:
            self._check_unpinned(family, member)
            self._set(family, without_member(found, member))

    def evict(self, num_bytes: int, *, spare: str | None = None) -> int:
        """Drop members until `num_bytes` are free that were not, if it can be; how many became so.

        Finished families first, mirrors before masters, the longest unused first; none of the family `spare`.
        """
        before = self.used_bytes
        for family, member in sorted(self._uses, key=self._eviction_order):
            if before - self.used_bytes >= num_bytes:
                break
            use, found = self._uses.get((family, member)), self._families.get(family)
            if use is None or found is None or use.pins or family == spare:
                continue
            left = without_member(found, member)
            # In place of a master, a mirror may take more than both did.
            if left is None or left.num_bytes < found.num_bytes:
                self._set(family, left)
        return before - self.used_bytes

    # ---- disk --------------------------------------------------------------------------------------------

    def save(self, folder: Path, kind: str) -> int:
        """Write all families to files in `folder`, in place of those of the same `kind` (of model, dtype, ...).

        How many are on disk. One that the system refuses to write leaves what was there, and a warning in the log.
        """
        saved = 0
        try:
            mirror_file.prepare(folder, kind, keep=self._families)
            for name, family in self._families.items():
                mirror_file.write(folder, kind, name, family)
                saved += 1
        except OSError as error:
            _log.warning("mirrors: %d of %d families saved in %s: %s", saved, len(self._families), folder, error)
        return saved

    def load(self, folder: Path, kind: str) -> int:
        """Read the families of `kind` that are in `folder` and not here, as finished ones, as far as there is room.

        How many members came. What is damaged does not come, and does not keep others from coming.
        """
        before = len(self._uses)
        for name, family in mirror_file.read_all(folder, kind):
            if name in self._families:
                continue
            left: Family | None = family
            for member in family.members:
                if left is not None and member in left.members and not is_intact(left, member):
                    left = without_member(left, member)
            if left is not None and left.num_bytes <= self.limit_bytes - self.used_bytes:
                self._set(name, left)
                self._finished.add(name)
        return len(self._uses) - before

    def check(self) -> None:
        """Raise AssertionError unless the books are right."""
        assert self.used_bytes == sum(family.num_bytes for family in self._families.values()) <= self.limit_bytes
        assert set(self._uses) == {(name, member) for name, found in self._families.items() for member in found.members}
        assert self._finished <= set(self._families)
        assert all(use.pins >= 0 for use in self._uses.values())
        for found in self._families.values():
            assert found.master not in found.mirrors
            for mirror in found.mirrors.values():
                assert mirror.base == found.version
                assert mirror.sources.shape == (found.dense.blocks.shape[1], len(mirror.keys))
                assert mirror.sources.max() < len(found.dense.blocks)
                own = mirror.sources[mirror.sources < 0]
                assert np.array_equal(~own, np.arange(len(mirror.patches)))

    # ---- small parts -------------------------------------------------------------------------------------

    def _put(self, name: str, family: Family) -> FamilyReport | None:
        """Let a family take the place of what it was, if there is room."""
        held = self._families.get(name)
        wanted = family.num_bytes - (held.num_bytes if held else 0)
        over = self.used_bytes + wanted - self.limit_bytes
        if over > 0 and self.evict(over, spare=name) < over:
            return None
        self._set(name, family)
        sizes = {member: mirror.num_bytes for member, mirror in family.mirrors.items()}
        ratios = {member: ratio_of(family, member) for member in family.mirrors}
        return FamilyReport(family.master, {family.master: family.dense.num_bytes, **sizes}, ratios)

    def _set(self, name: str, family: Family | None) -> None:
        held = self._families.pop(name, None)
        self.used_bytes += (family.num_bytes if family else 0) - (held.num_bytes if held else 0)
        for member in held.members if held else ():
            if family is None or member not in family.members:
                del self._uses[name, member]
        if family is None:
            self._finished.discard(name)
            return
        self._families[name] = family
        for member in family.members:
            if (name, member) not in self._uses:
                self._uses[name, member] = _Use(next(self._clock))

    def _found(self, name: str, member: str, verify: bool) -> Family | None:
        family = self._families.get(name)
        if family is None or member not in family.members:
            return None
        if verify and not is_intact(family, member):
            _log.warning("mirrors: bytes of %r of %r are not those that were stored; it is dropped", member, name)
            self._set(name, without_member(family, member))
            return None
        self._uses[name, member].last = next(self._clock)
        return family

    def _check_unpinned(self, family: str, member: str) -> None:
        if self._uses[family, member].pins:
            raise ValueError(f"{member!r} of {family!r} is pinned: unpin it before it is dropped or replaced")

    def _eviction_order(self, key: tuple[str, str]) -> tuple[bool, bool, int]:
        family, member = key
        return family not in self._finished, member == self._families[family].master, self._uses[key].last
