"""The third tier: what of the host's KV is on disk as well, and what of it is being read back.

`offer` takes blocks that have just come to the host; as many as a few at a time are written, in the order they came, in
a thread beside everything else. `start_read` fills host slots from records. `collect` ends what is done. Any error of
the disk switches the tier off with one warning: it then finds nothing and writes nothing, and serving goes on.

A record that is written or read is pinned, and so is the host slot at the other end; a content that is not what its
header says is forgotten and computed again.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import Final, Protocol

from kvarn.serving.kvcache.disk_file import DiskFile, Header, salt_digest
from kvarn.serving.kvcache.host import HostEntry, HostIndex

_log = logging.getLogger(__name__)

_WRITES: Final = 16
"""Blocks being written at a time: they pin their host slots."""
_MEMORY: Final = 0.8
"""What the reads, or writes, so far count for in the average when one more has ended."""
_FIRST_GUESS: Final = 1e9
"""Bytes a second that are read or written, before any have been."""


@dataclass(slots=True, eq=False)
class DiskEntry:
    """A record in the books; see disk_file.Header."""

    record: int
    header: Header
    clean: bool = False
    """Whether its content is there."""
    pins: int = 0


class DiskIndex:
    """Which block is in which of `num_records` records.

    Where there is no record left, the least recently used block goes that no other one follows: a block without those
    before it cannot be used.
    """

    def __init__(self, num_records: int, stored: Iterable[tuple[int, Header]] = ()) -> None:
        """`stored`: what the file has from an earlier life."""
        self.num_records = num_records
        self._by_hash: dict[bytes, DiskEntry] = {}
        self._followers: dict[bytes, int] = {}
        """How many entries follow a block, in the index or not."""
        self._leaves: OrderedDict[bytes, None] = OrderedDict()
        """Entries that may go, by when they were used."""
        latest_first = sorted(stored, key=lambda pair: -pair[1].sequence)
        for record, header in latest_first:
            if header.hash not in self._by_hash:  # else an older copy
                self._insert(DiskEntry(record, header, clean=True))
        for entry in reversed(self._by_hash.values()):
            self._note_idle(entry)
        self._sequence = latest_first[0][1].sequence if latest_first else 0
        taken = {entry.record for entry in self._by_hash.values()}
        self._free = [record for record in range(num_records - 1, -1, -1) if record not in taken]

    @property
    def num_entries(self) -> int:
        return len(self._by_hash)

    def __contains__(self, key: bytes) -> bool:
        return key in self._by_hash

    def find(self, key: bytes, parent: bytes, tokens: bytes, salt: bytes) -> DiskEntry | None:
        """The entry of exactly this block, complete or being written."""
        entry = self._by_hash.get(key)
        if entry is None:
            return None
        header = entry.header
        return entry if (header.parent, header.tokens, header.salt) == (parent, tokens, salt) else None

    def holds(self, key: bytes) -> bool:
        """Whether there is a complete record of the block of this hash; for statistics: tokens are not compared."""
        entry = self._by_hash.get(key)
        return entry is not None and entry.clean

    def reserve(self, key: bytes, parent: bytes, tokens: bytes, salt: bytes) -> DiskEntry | None:
        """A record for a block that is to be written, pinned once; None when there is none, or the key taken."""
        if key in self._by_hash:
            return None
        if not self._free:
            if parent in self._leaves:
                self._leaves.move_to_end(parent)
            leaf = next(iter(self._leaves), parent)
            if leaf == parent:
                return None
            self.drop(self._by_hash[leaf])
        self._sequence += 1
        entry = DiskEntry(self._free.pop(), Header(key, parent, tokens, salt, self._sequence), pins=1)
        self._insert(entry)
        return entry

    def written(self, entry: DiskEntry, header: Header) -> None:
        """The content is complete, and `header` has its checksum; the pin is given back."""
        entry.header, entry.clean = header, True
        self.unpin(entry)

    def drop(self, entry: DiskEntry) -> None:
        """Forget an entry that nobody pins any more but the caller."""
        header = entry.header
        del self._by_hash[header.hash]
        self._leaves.pop(header.hash, None)
        self._free.append(entry.record)
        self._followers[header.parent] -= 1
        if not self._followers[header.parent]:
            del self._followers[header.parent]
            parent = self._by_hash.get(header.parent)
            if parent is not None and parent.pins == 0:
                self._note_idle(parent)
                if parent.header.sequence < header.sequence:  # used through what followed it
                    self._leaves.move_to_end(header.parent, last=False)

    def use(self, entry: DiskEntry) -> None:
        """Note that an entry was of use."""
        self._sequence += 1
        entry.header = replace(entry.header, sequence=self._sequence)
        if entry.header.hash in self._leaves:
            self._leaves.move_to_end(entry.header.hash)

    def pin(self, entry: DiskEntry) -> None:
        """Keep an entry until it is unpinned as often."""
        entry.pins += 1
        self._leaves.pop(entry.header.hash, None)

    def unpin(self, entry: DiskEntry) -> None:
        """One pin less."""
        entry.pins -= 1
        if entry.pins == 0:
            self._note_idle(entry)

    def check(self) -> None:
        """Raise AssertionError unless every record is in exactly one place."""
        entries = self._by_hash.values()
        records = [entry.record for entry in entries]
        assert sorted(self._free + records) == list(range(self.num_records)), "records are lost or used twice"
        assert all(entry.clean or entry.pins for entry in entries), "an incomplete record has no write"
        idle = {key for key, entry in self._by_hash.items() if entry.pins == 0 and key not in self._followers}
        assert idle == set(self._leaves), "leaves and pins disagree"
        assert sum(self._followers.values()) == len(entries), "followers are miscounted"

    def _insert(self, entry: DiskEntry) -> None:
        header = entry.header
        self._by_hash[header.hash] = entry
        self._followers[header.parent] = self._followers.get(header.parent, 0) + 1
        self._leaves.pop(header.parent, None)

    def _note_idle(self, entry: DiskEntry) -> None:
        if entry.header.hash not in self._followers:
            self._leaves[entry.header.hash] = None


@dataclass(slots=True, eq=False)
class DiskJob:
    """Records to write from, or to read into, memory: `contents[i]` of `entries[i]`."""

    writes: bool
    entries: list[DiskEntry]
    contents: list[memoryview]
    headers: list[Header] = field(default_factory=list)
    """As they are on disk now, for as many leading entries as were written or read."""
    seconds: float = 0.0
    error: str | None = None
    """Why the disk failed."""


class DiskIO(Protocol):
    """Works on jobs beside everything else, reads before writes. As kvarn.serving.kvcache.copies.Copier."""

    def start(self, job: DiskJob) -> None: ...
    def finished(self) -> list[DiskJob]: ...
    def wait(self, seconds: float) -> None: ...
    def close(self) -> None:
        """End what is being worked on, drop the rest, let go of the files."""
        ...


def perform(file: DiskFile, job: DiskJob) -> None:
    """What a DiskIO does with a job. A read ends at the first record that is not what it should be, and erases it."""
    started = monotonic()
    try:
        for entry, content in zip(job.entries, job.contents, strict=True):
            header = entry.header
            if job.writes:
                header = file.write(entry.record, header, content)
            elif file.read(entry.record, header, content):
                file.write_header(entry.record, header)  # with the sequence of this use
            else:
                file.erase(entry.record)
                break
            job.headers.append(header)
    except Exception as error:  # the thread must live: requests wait for it
        job.error = f"{type(error).__name__}: {error}"
    job.seconds = monotonic() - started


class DiskTier:
    """Records behind the host's slots. Called by the tiers alone."""

    def __init__(self, index: DiskIndex, io: DiskIO, slot: Callable[[int], memoryview], block_bytes: int) -> None:
        """`slot(i)` gives the memory of a host slot of `block_bytes`."""
        self.index = index
        self.io = io
        self.slot = slot
        self.block_seconds = block_bytes / _FIRST_GUESS
        """What reading a block has lately taken."""
        self.write_block_seconds = self.block_seconds
        """What writing one has: for statistics."""
        self.is_on = True
        self.written_blocks = self.read_blocks = self.bad_blocks = 0
        self._backlog: deque[HostEntry] = deque()
        self._writes: dict[DiskJob, HostEntry] = {}
        self._reading_blocks = 0

    @property
    def writing(self) -> bool:
        """Whether anything is still to be written."""
        return bool(self._writes or (self._backlog and self.is_on))

    def find(self, key: bytes, parent: bytes, tokens: bytes, salt: str) -> DiskEntry | None:
        """The complete record of exactly this block."""
        entry = self.index.find(key, parent, tokens, salt_digest(salt)) if self.is_on else None
        return entry if entry is not None and entry.clean else None

    def holds(self, key: bytes) -> bool:
        """See DiskIndex.holds; nothing once the tier is off."""
        return self.is_on and self.index.holds(key)

    def read_seconds(self, blocks: int) -> float:
        """Until so many more blocks would be read, behind what is queued."""
        return (self._reading_blocks + blocks) * self.block_seconds if blocks else 0.0

    def pinned(self) -> list[HostEntry]:
        """Host entries that are being written to disk."""
        return list(self._writes.values())

    def offer(self, entry: HostEntry) -> None:
        """A block has come to the host; it is written when its turn comes, if it is still there then."""
        if self.is_on:
            self._backlog.append(entry)

    def start_read(self, entries: list[DiskEntry], slots: list[int]) -> DiskJob:
        """Fill host slots, which must be nobody else's until `collect` returns the job."""
        for entry in entries:
            self.index.pin(entry)
        for entry in reversed(entries):  # so that the first of a chain counts as the last used
            self.index.use(entry)
        job = DiskJob(False, entries, [self.slot(slot) for slot in slots])
        self._reading_blocks += len(entries)
        self.io.start(job)
        return job

    def collect(self, host: HostIndex) -> list[DiskJob]:
        """End the jobs that are done, and start writes; reads that have ended. A read filled len(job.headers) slots."""
        ended = []
        for job in self.io.finished():
            if job.error is not None:
                self._switch_off(job.error)
            if job.writes:
                self._end_write(job, host)
            else:
                self._end_read(job)
                ended.append(job)
        self._start_writes(host)
        return ended

    def _end_write(self, job: DiskJob, host: HostIndex) -> None:
        (entry,) = job.entries
        host.unpin(self._writes.pop(job))
        if job.headers:
            self.index.written(entry, job.headers[0])
            self.written_blocks += 1
            self.write_block_seconds = _averaged(self.write_block_seconds, job.seconds)
        else:
            self.index.drop(entry)

    def _end_read(self, job: DiskJob) -> None:
        good = len(job.headers)
        self._reading_blocks -= len(job.entries)
        self.read_blocks += good
        for entry in reversed(job.entries):
            self.index.unpin(entry)
        if good:
            self.block_seconds = _averaged(self.block_seconds, job.seconds / good)
        if good < len(job.entries) and job.error is None:
            self.bad_blocks += 1
            # Those behind it too: a file is seldom damaged in one place only, and they are computed anew anyway. A slot
            # is filled by one read at a time, so nobody else has them.
            for entry in reversed(job.entries[good:]):
                self.index.drop(entry)

    def _start_writes(self, host: HostIndex) -> None:
        limit = max(1, min(_WRITES, host.num_slots // 4))
        if len(self._backlog) > 2 * host.num_slots:  # what the host has given up need not wait here
            self._backlog = deque(entry for entry in self._backlog if not entry.lost)
        while self._backlog and len(self._writes) < limit and self.is_on:
            entry = self._backlog.popleft()
            if entry.lost or not entry.clean or (entry.parent and entry.parent not in self.index):
                continue
            salt = salt_digest(entry.salt)
            known = self.index.find(entry.hash, entry.parent, entry.tokens, salt)
            if known is not None:
                self.index.use(known)
                continue
            record = self.index.reserve(entry.hash, entry.parent, entry.tokens, salt)
            if record is None:
                continue
            host.pin(entry)
            job = DiskJob(True, [record], [self.slot(entry.slot)])
            self._writes[job] = entry
            self.io.start(job)

    def _switch_off(self, reason: str) -> None:
        if self.is_on:
            self.is_on = False
            self._backlog.clear()
            _log.warning("the disk cache is switched off: %s", reason)


def _averaged(before: float, seconds: float) -> float:
    return _MEMORY * before + (1 - _MEMORY) * seconds
