"""Blocks of KV in files that outlive the process: the format, and reading and writing it.

Two files a kind of KV, so that a start reads little: what each record holds, and the records' contents.

    kv-KIND.index   a first header that says what kind, then one header of fixed size a record
    kv-KIND.blocks  the contents, each from the start of a page on

A header has checksums of itself and of its content, both keyed with the kind, the one also with its place, the other
with the block's hash. Opening looks at headers alone; a content is checked when it is read. So writes may reach the
disk in any order: a header and a content that do not belong together, because a process or a machine died between
them, because one was torn, or because a bit has flipped, are a record that is not there. That costs a recomputation
and nothing else.

Files grow as records are written, only their owner may read them, and one process at a time has them open.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Final

from kvarn.errors import KvarnError

_VERSION: Final = 1
_PAGE: Final = 4096
_FIXED: Final = struct.Struct("<QB16s16s32s16s")
"""Of a header: sequence, whether there is a parent, hash, parent, salt, checksum of the content. Then the tokens."""
_CHECKSUM_BYTES: Final = 16
_SCANNED_BYTES: Final = 2**22


@dataclass(frozen=True, slots=True)
class Header:
    """What a record holds: the block of this hash, after the block `parent`, of these tokens, for this salt."""

    hash: bytes
    """16 bytes, as `parent`, which is empty for a first block."""
    parent: bytes
    tokens: bytes
    salt: bytes
    """32 bytes: a digest, for the file is to name nobody."""
    sequence: int
    """The higher, the later it was used."""
    checksum: bytes = b""
    """Of the content; 16 bytes once it is written."""


@lru_cache(maxsize=1024)
def salt_digest(salt: str) -> bytes:
    """What stands for a salt in a header."""
    return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=32).digest()


class DiskFile:
    """Records of one kind of KV. Not thread-safe. Every method but `close` raises OSError when the system does."""

    def __init__(self, folder: Path, kind: str, *, content_bytes: int, tokens_bytes: int, limit_bytes: int) -> None:
        """Open or make the files of `kind` (any text; equal for KV that may be mixed) in `folder`.

        Each record has `content_bytes` of KV and `tokens_bytes` of tokens; as many as `limit_bytes` allow are kept.
        KvarnError when not one fits, OSError when another process has the files open or the system refuses.
        """
        self._content_bytes = content_bytes
        self._stride = -(-content_bytes // _PAGE) * _PAGE
        self._tokens_bytes = tokens_bytes
        # A power of two: no header lies across the sectors that a disk writes as one.
        self._header_bytes = 1 << (_FIXED.size + tokens_bytes + _CHECKSUM_BYTES - 1).bit_length()
        self.num_records = max(0, limit_bytes - _PAGE) // (self._header_bytes + self._stride)
        if not self.num_records:
            raise KvarnError(f"{limit_bytes} bytes on disk hold no block of {content_bytes} bytes: raise --disk-memory")
        first = f"kvarn KV {_VERSION} {content_bytes} {tokens_bytes} {kind}".encode()
        self._key = blake2b(first, digest_size=32).digest()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        name = folder / f"kv-{self._key.hex()[:24]}"
        with contextlib.ExitStack() as opened:
            self._index = _open(name.with_suffix(".index"), opened)
            _lock(self._index, folder)
            self._blocks = _open(name.with_suffix(".blocks"), opened)
            self._open_as(blake2b(first).digest().ljust(_PAGE, b"\0"))
            _remove_others(folder, name.name, limit_bytes)
            opened.pop_all()

    def scan(self) -> Iterator[tuple[int, Header]]:
        """The number and the header of each record that has a valid one, and a content of some kind."""
        size = self._header_bytes
        contents = (os.fstat(self._blocks).st_size - self._content_bytes) // self._stride + 1
        batch = max(1, _SCANNED_BYTES // size)
        for start in range(0, self.num_records, batch):
            found = os.pread(self._index, min(batch, self.num_records - start) * size, _PAGE + start * size)
            for place in range(len(found) // size):
                header = self._unpacked(start + place, found[place * size : (place + 1) * size])
                if header is not None and start + place < contents:
                    yield start + place, header

    def write(self, record: int, header: Header, content: bytes | memoryview) -> Header:
        """Write a record; its header with the content's checksum."""
        header = replace(header, checksum=self._checksum(header.hash, content))
        _write_all(self._blocks, content, record * self._stride)
        self.write_header(record, header)
        return header

    def write_header(self, record: int, header: Header) -> None:
        """Write a record's header anew, its content being as it is."""
        _write_all(self._index, self._packed(record, header), _PAGE + record * self._header_bytes)

    def read(self, record: int, header: Header, into: memoryview) -> bool:
        """Fill `into` with a record's content; False when what was there is not what its header says."""
        read = 0
        while read < len(into):
            count = os.preadv(self._blocks, [into[read:]], record * self._stride + read)
            if count == 0:
                return False  # the file ends here
            read += count
        return self._checksum(header.hash, into) == header.checksum

    def erase(self, record: int) -> None:
        """Make a record one that is not there."""
        _write_all(self._index, bytes(self._header_bytes), _PAGE + record * self._header_bytes)

    def close(self) -> None:
        """Let others open the files."""
        os.close(self._blocks)
        os.close(self._index)

    # ---- small parts -------------------------------------------------------------------------------------

    def _open_as(self, first: bytes) -> None:
        """Begin anew unless the files begin as they should; give up records above the limit."""
        os.utime(self._index)  # when it was last in use
        if os.pread(self._index, _PAGE, 0) != first:
            os.ftruncate(self._index, 0)
            os.ftruncate(self._blocks, 0)
            _write_all(self._index, first, 0)
        for file, end in (
            (self._index, _PAGE + self.num_records * self._header_bytes),
            (self._blocks, self.num_records * self._stride),
        ):
            if os.fstat(file).st_size > end:
                os.ftruncate(file, end)

    def _packed(self, record: int, header: Header) -> bytes:
        packed = _FIXED.pack(
            header.sequence, bool(header.parent), header.hash, header.parent, header.salt, header.checksum
        )
        packed = (packed + header.tokens).ljust(self._header_bytes - _CHECKSUM_BYTES, b"\0")
        return packed + self._header_checksum(record, packed)

    def _unpacked(self, record: int, packed: bytes) -> Header | None:
        body, checksum = packed[:-_CHECKSUM_BYTES], packed[-_CHECKSUM_BYTES:]
        if self._header_checksum(record, body) != checksum:
            return None
        sequence, has_parent, key, parent, salt, content = _FIXED.unpack_from(body)
        tokens = body[_FIXED.size : _FIXED.size + self._tokens_bytes]
        return Header(key, parent if has_parent else b"", tokens, salt, sequence, content)

    def _header_checksum(self, record: int, body: bytes) -> bytes:
        place = record.to_bytes(8, "little")
        return blake2b(body, digest_size=_CHECKSUM_BYTES, key=self._key, person=place).digest()

    def _checksum(self, key: bytes, content: bytes | memoryview) -> bytes:
        return blake2b(content, digest_size=_CHECKSUM_BYTES, key=self._key, person=key).digest()


def _open(path: Path, opened: contextlib.ExitStack) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    opened.callback(os.close, file)
    return file


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(f"another server uses {folder} for this model; give each its own folder") from error


def _write_all(file: int, data: bytes | memoryview, offset: int) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        count = os.pwrite(file, rest, offset)
        rest, offset = rest[count:], offset + count


def _remove_others(folder: Path, name: str, limit_bytes: int) -> None:
    """Delete files of other kinds, the longest unused first, until the folder is below the limit."""
    sizes = {path: sum(_taken_bytes(part) for part in _parts(path)) for path in folder.glob("kv-*.index")}
    total = sum(sizes.values())
    for path in sorted(sizes, key=lambda path: path.stat().st_mtime):
        if total <= limit_bytes:
            return
        if path.stem == name:
            continue
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:  # in use, it stays
            _lock(_open(path, opened), folder)
            for part in _parts(path):
                part.unlink(missing_ok=True)
            total -= sizes[path]


def _parts(index: Path) -> tuple[Path, Path]:
    return index, index.with_suffix(".blocks")


def _taken_bytes(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_blocks * 512
    return 0
