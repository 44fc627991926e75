"""A family of caches as one dense master and mirrors of it: what a mirror holds is what differs, and nothing more.

A member's cache is a sequence of blocks, each [L, 2, Hkv, B, D] of keys and values and named by a key of the caller's,
such as a segment and a number. Blocks of one key are compared layer by layer, byte by byte; where they differ, and
where the master has no such block, the mirror keeps a *patch*: a layer of its own block, [2, Hkv, B, D]. So members may
have their blocks in any order. Mirrors are always of a master, never of a mirror.

Everything here is a pure function of arrays: a family is never changed, another one takes its place.

Source: master and mirrors after TokenDance (arXiv:2604.03143, section 4.3), with replacement values instead of sums.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

BlockKey = tuple[str, int]
"""What a block is, alike for all members: the segment it is of, and its number there."""
Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int32]
Checksums = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class MemberCache:
    """What a member leaves. Slots that hold nothing should be zeros: they are compared like the others."""

    keys: tuple[BlockKey, ...]
    blocks: Array
    """[n, L, 2, Hkv, B, D] of any dtype of the right width: bytes count, values do not."""
    facts: bytes = b""
    """The caller's: tokens, positions, how the keys are rotated."""
    inherited: tuple[BlockKey, ...] = ()
    """Blocks that it has as the family's master has them, and that are not given again: they stand before `keys`."""


@dataclass(frozen=True, slots=True)
class Dense:
    """Blocks as they are."""

    keys: tuple[BlockKey, ...]
    blocks: Array
    checksums: Checksums
    """[n, L] CRC-32"""
    facts: bytes

    @property
    def num_bytes(self) -> int:
        return self.blocks.nbytes + self.checksums.nbytes + len(self.facts)


@dataclass(frozen=True, slots=True)
class Mirror:
    """What differs from a master of version `base`."""

    keys: tuple[BlockKey, ...]
    base: int
    sources: Indices
    """[L, n]: a block of the master's, or ~ a patch's number"""
    patches: Array
    """[E, 2, Hkv, B, D], those of a layer together and in order of the layers"""
    checksums: Checksums
    """[E] CRC-32"""
    facts: bytes

    @property
    def num_bytes(self) -> int:
        return self.patches.nbytes + self.sources.nbytes + self.checksums.nbytes + len(self.facts)


@dataclass(frozen=True, slots=True)
class Family:
    """One master and its mirrors. `version` counts the masters it has had."""

    master: str
    dense: Dense
    mirrors: Mapping[str, Mirror]
    version: int = 0

    @property
    def members(self) -> tuple[str, ...]:
        return (self.master, *self.mirrors)

    @property
    def num_bytes(self) -> int:
        return self.dense.num_bytes + sum(mirror.num_bytes for mirror in self.mirrors.values())

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """[2, Hkv, B, D]"""
        return self.dense.blocks.shape[2:]


def dense_of(cache: MemberCache) -> Dense:
    """A copy of a member's blocks. ValueError when they are not what `MemberCache` says."""
    blocks = np.array(cache.blocks, order="C")
    if blocks.ndim != 6 or not blocks.size or len(blocks) != len(cache.keys):
        raise ValueError(f"{len(cache.keys)} keys, blocks {blocks.shape}: expected as many blocks [n, L, 2, Hkv, B, D]")
    checksums = np.array([[_crc(layer) for layer in block] for block in blocks], dtype=np.uint32)
    return Dense(tuple(cache.keys), blocks, checksums, cache.facts)


def family_of(members: Mapping[str, Dense], version: int = 0) -> Family:
    """A family whose master is the member that the others differ from least, of several the first by name."""
    names = sorted(members)
    master = min(names, key=lambda name: sum(int(_differs(members[name], other).sum()) for other in members.values()))
    dense = members[master]
    mirrors = {name: mirror_of(dense, members[name], version) for name in names if name != master}
    return Family(master, dense, mirrors, version)


def mirror_of(master: Dense, cache: Dense, base: int) -> Mirror:
    """A cache as what it differs in. ValueError when its blocks have another shape or type than the master's."""
    one, other = master.blocks, cache.blocks
    if one.shape[1:] != other.shape[1:] or one.dtype != other.dtype:
        raise ValueError(f"blocks {other.shape[1:]} of {other.dtype} in a family of {one.shape[1:]} of {one.dtype}")
    places = _places(master, cache)
    differs = _differs(master, cache)
    for block, layer in np.argwhere(~differs):  # equal checksums say little
        differs[block, layer] = not _same_bytes(one[places[block], layer], other[block, layer])
    patched = np.argwhere(differs.T)  # (layer, block), layer by layer
    sources = np.repeat(places[None], other.shape[1], axis=0)
    sources[differs.T] = ~np.arange(len(patched), dtype=np.int32)
    layers, blocks = patched.T
    return Mirror(cache.keys, base, sources, other[blocks, layers], cache.checksums[blocks, layers], cache.facts)


def materialised(family: Family, member: str) -> Dense:
    """A member's cache as it was stored. KeyError when there is no such member."""
    if member == family.master:
        return family.dense
    mirror = family.mirrors[member]
    num_layers, n = mirror.sources.shape
    blocks = np.empty((n, num_layers, *family.patch_shape), dtype=mirror.patches.dtype)
    checksums = np.empty((n, num_layers), dtype=np.uint32)
    for layer, sources in enumerate(mirror.sources):
        shared, own = sources >= 0, sources < 0
        blocks[shared, layer] = family.dense.blocks[sources[shared], layer]
        checksums[shared, layer] = family.dense.checksums[sources[shared], layer]
        blocks[own, layer] = mirror.patches[~sources[own]]
        checksums[own, layer] = mirror.checksums[~sources[own]]
    return Dense(mirror.keys, blocks, checksums, mirror.facts)


def blocks_of(family: Family, member: str, keys: Sequence[BlockKey]) -> Array | None:
    """[n, L, 2, Hkv, B, D]: a member's blocks of these keys; None where it has not all. KeyError without the member."""
    dense = family.dense
    mirror = None if member == family.master else family.mirrors[member]
    place = {key: i for i, key in enumerate(dense.keys if mirror is None else mirror.keys)}
    if not all(key in place for key in keys):
        return None
    places = [place[key] for key in keys]
    if mirror is None:
        found: Array = dense.blocks[places]
        return found
    blocks = np.empty((len(places), *dense.blocks.shape[1:]), dtype=dense.blocks.dtype)
    for layer, sources in enumerate(mirror.sources[:, places]):
        shared, own = sources >= 0, sources < 0
        blocks[shared, layer] = dense.blocks[sources[shared], layer]
        blocks[own, layer] = mirror.patches[~sources[own]]
    return blocks


def is_intact(family: Family, member: str) -> bool:
    """Whether every byte that a member's cache is made of is as it was stored."""
    dense = family.dense
    if member == family.master:
        return all(_crc(x) == c for x, c in zip(_chunks(dense.blocks), dense.checksums.flat, strict=True))
    mirror = family.mirrors[member]
    if mirror.base != family.version:
        return False
    layers, blocks = np.nonzero(mirror.sources >= 0)
    used = mirror.sources[layers, blocks]
    return all(_crc(x) == c for x, c in zip(mirror.patches, mirror.checksums, strict=True)) and all(
        _crc(dense.blocks[block, layer]) == dense.checksums[block, layer]
        for block, layer in set(zip(used.tolist(), layers.tolist(), strict=True))
    )


def with_member(family: Family | None, member: str, cache: Dense, inherited: tuple[BlockKey, ...] = ()) -> Family:
    """The family and one member more, which it has not yet: its master if there is no family.

    ValueError when the master has not what is inherited.
    """
    if not set(inherited) <= (set(family.dense.keys) if family is not None else set()):
        raise ValueError("blocks are inherited that the family's master has not")
    if family is None:
        return Family(member, cache, {})
    mirror = mirror_of(family.dense, cache, family.version)
    if inherited:
        place = {key: i for i, key in enumerate(family.dense.keys)}
        shared = np.array([place[key] for key in inherited], dtype=np.int32)
        sources = np.concatenate([np.repeat(shared[None], len(mirror.sources), axis=0), mirror.sources], axis=1)
        mirror = replace(mirror, keys=inherited + mirror.keys, sources=sources)
    return replace(family, mirrors={**family.mirrors, member: mirror})


def without_member(family: Family, member: str) -> Family | None:
    """The family without a member; None when nobody is left.

    Where the master goes, the mirror of the fewest patches, of several the first by name, takes its place, and the
    others become mirrors of that. Those that are not intact go too: what they are cannot be said any more.
    """
    if member != family.master:
        return replace(family, mirrors={name: mirror for name, mirror in family.mirrors.items() if name != member})
    intact = [name for name in family.mirrors if is_intact(family, name)]
    if not intact:
        return None
    heir = min(intact, key=lambda name: (len(family.mirrors[name].patches), name))
    dense, version = materialised(family, heir), family.version + 1
    others = (name for name in intact if name != heir)
    mirrors = {name: mirror_of(dense, materialised(family, name), version) for name in others}
    return Family(heir, dense, mirrors, version)


def ratio_of(family: Family, member: str) -> float:
    """How many times smaller a mirror is than the blocks it stands for; 1 for the master."""
    if member == family.master:
        return 1.0
    mirror = family.mirrors[member]
    patch_bytes = family.dense.blocks[0, 0].nbytes
    return float(mirror.sources.size * patch_bytes / mirror.num_bytes)


def predicted_ratio(private_share: float, refreshed_share: float) -> float:
    """The most that a mirror can be smaller: it must store its private tokens, and of the others the refreshed ones."""
    return 1.0 / (private_share + (1.0 - private_share) * refreshed_share)


def touched_share(refreshed_share: float, block_size: int) -> float:
    """The share of blocks with a refreshed token when tokens are refreshed here and there, independently."""
    return float(1.0 - (1.0 - refreshed_share) ** block_size)


# ---- small parts -----------------------------------------------------------------------------------------


def _places(master: Dense, cache: Dense) -> Indices:
    """[n]: the master's block of each block's key, or -1."""
    place = {key: i for i, key in reversed(list(enumerate(master.keys)))}
    return np.array([place.get(key, -1) for key in cache.keys], dtype=np.int32)


def _differs(master: Dense, cache: Dense) -> npt.NDArray[np.bool_]:
    """[n, L]: which layers of which blocks differ by their checksums, or are not there."""
    places = _places(master, cache)
    if master.checksums.shape[1] != cache.checksums.shape[1]:
        return np.ones(cache.checksums.shape, dtype=bool)
    differs: npt.NDArray[np.bool_] = master.checksums[places] != cache.checksums
    differs[places < 0] = True
    return differs


def _chunks(blocks: Array) -> Array:
    return blocks.reshape(-1, *blocks.shape[2:])


def _crc(chunk: Array) -> int:
    return zlib.crc32(chunk.data)


def _same_bytes(one: Array, other: Array) -> bool:
    return np.array_equal(one.view(np.uint8), other.view(np.uint8))
