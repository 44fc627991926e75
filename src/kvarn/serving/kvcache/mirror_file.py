"""Families of mirrors in files, one a family, compressed as they are in memory: the format, reading and writing.

    mirrors-KIND-FAMILY.kv    a first line, the length and checksum of the index, the index, the master's blocks, then
                              each mirror's patches

The index, msgpack, says what the members are and has the checksums of all that follows; it is checked when it is read.
The rest is not: that is for `mirror_family.is_intact`, member by member, so that damage costs those it concerns. What
is missing at the end reads as zeros. A file is written under another name and then renamed: it is whole, or not there.
Only its owner may read it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NoReturn, cast

import msgspec
import numpy as np
import numpy.typing as npt

from kvarn.serving.kvcache.mirror_family import BlockKey, Dense, Family, Mirror

_FIRST: Final = b"kvarn mirrors 1\n"
_LENGTH: Final = struct.Struct("<Q16s")


class _Member(msgspec.Struct, array_like=True):
    name: str
    keys: tuple[BlockKey, ...]
    facts: bytes
    count: int
    """Of the master, its blocks; of a mirror, its patches."""
    checksums: bytes
    base: int
    sources: bytes
    """Of a mirror."""


class _Index(msgspec.Struct, array_like=True):
    kind: str
    family: str
    version: int
    dtype: str
    block_shape: tuple[int, int, int, int, int]
    """[L, 2, Hkv, B, D]"""
    members: list[_Member]
    """The master first."""


def prepare(folder: Path, kind: str, keep: Iterable[str]) -> None:
    """Make the folder; delete from it what is of this kind and of no family in `keep`. OSError when it cannot be."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    kept = {_path(folder, kind, family) for family in keep}
    for path in folder.glob(f"{_prefix(kind)}*"):
        if path not in kept:
            path.unlink()


def write(folder: Path, kind: str, name: str, family: Family) -> None:
    """Write one family. OSError when the system refuses: what was there before is then still there."""
    dense = family.dense
    master = _Member(family.master, dense.keys, dense.facts, len(dense.blocks), dense.checksums.tobytes(), 0, b"")
    mirrors = [
        _Member(
            member, mirror.keys, mirror.facts, len(mirror.patches), mirror.checksums.tobytes(), mirror.base,
            mirror.sources.tobytes(),
        )
        for member, mirror in family.mirrors.items()
    ]  # fmt: skip
    shape = cast("tuple[int, int, int, int, int]", dense.blocks.shape[1:])
    index = msgspec.msgpack.encode(
        _Index(kind, name, family.version, dense.blocks.dtype.str, shape, [master, *mirrors])
    )
    path = _path(folder, kind, name)
    new = path.with_suffix(".new")
    try:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(_FIRST + _LENGTH.pack(len(index), _digest(index)) + index)
            for arrays in (dense.blocks, *(mirror.patches for mirror in family.mirrors.values())):
                file.write(arrays.data if arrays.size else b"")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def read_all(folder: Path, kind: str) -> Iterator[tuple[str, Family]]:
    """Name and family of each file of this kind whose index is whole; contents may be damaged."""
    for path in sorted(folder.glob(f"{_prefix(kind)}*.kv")):
        with contextlib.suppress(OSError, ValueError, msgspec.MsgspecError):
            yield _read(path, kind)


def _read(path: Path, kind: str) -> tuple[str, Family]:
    with path.open("rb") as file:
        if file.read(len(_FIRST)) != _FIRST:
            _refuse(path)
        length, digest = _LENGTH.unpack(file.read(_LENGTH.size).ljust(_LENGTH.size, b"\0"))
        raw = file.read(min(length, path.stat().st_size))
        if _digest(raw) != digest:
            _refuse(path)
        index = msgspec.msgpack.decode(raw, type=_Index)
        if index.kind != kind:
            _refuse(path)
        dtype = np.dtype(index.dtype)

        def array(shape: tuple[int, ...]) -> npt.NDArray[Any]:
            result = np.zeros(shape, dtype=dtype)
            if result.size:
                file.readinto(result.data.cast("B"))
            return result

        num_layers, patch_shape = index.block_shape[0], index.block_shape[1:]
        master, *others = index.members
        dense = Dense(
            master.keys, array((master.count, *index.block_shape)),
            np.frombuffer(master.checksums, dtype=np.uint32).reshape(-1, num_layers), master.facts,
        )  # fmt: skip
        mirrors = {
            other.name: Mirror(
                other.keys, other.base, np.frombuffer(other.sources, dtype=np.int32).reshape(num_layers, -1),
                array((other.count, *patch_shape)), np.frombuffer(other.checksums, dtype=np.uint32), other.facts,
            )
            for other in others
        }  # fmt: skip
        return index.family, Family(master.name, dense, mirrors, index.version)


def _refuse(path: Path) -> NoReturn:
    raise ValueError(f"{path} is no whole file of mirrors of this kind")


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


def _prefix(kind: str) -> str:
    return f"mirrors-{_digest(kind.encode()).hex()[:16]}-"


def _path(folder: Path, kind: str, family: str) -> Path:
    return folder / f"{_prefix(kind)}{_digest(family.encode('utf-8', 'surrogatepass')).hex()}.kv"
