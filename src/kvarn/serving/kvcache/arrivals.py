"""Loads that come through the host from the disk: which slots are being filled, and which requests wait for them.

A load takes a slot of the host for each block that only the disk has, and starts a read of them. It waits here until
all its blocks are on the host, also those that another load had begun to read, and is then copied to the device.

What keeps it safe: a read has a pin of its own on each slot that it fills, and a load one on each entry that it will
copy, so no slot is given away before both have ended, whatever happens to the request meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from kvarn.serving.kvcache.disk import DiskEntry, DiskJob, DiskTier
from kvarn.serving.kvcache.host import HostEntry, HostIndex
from kvarn.serving.request import Request


@dataclass(slots=True, eq=False)
class Arrival:
    """A load that waits for the disk: the host entries it will copy, once all are filled, and where they go."""

    entries: list[HostEntry]
    """Each with a pin for it."""
    first: int
    """The number of the first block."""
    request: Request | None
    """None when it has ended meanwhile."""


class Arrivals:
    """Called by the tiers alone."""

    def __init__(self, host: HostIndex, disk: DiskTier | None) -> None:
        self._host = host
        self._disk = disk
        self._waiting: list[Arrival] = []
        self._reads: dict[DiskJob, list[HostEntry]] = {}
        """What is being read, and the host entries it fills."""
        self._filling: set[HostEntry] = set()
        """All of these; others who need them too wait for the same read."""

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def is_filling(self, entry: HostEntry) -> bool:
        """Whether an entry that is not clean is being read from the disk."""
        return entry in self._filling

    def gather(self, found: list[HostEntry | DiskEntry], salt: str) -> list[HostEntry]:
        """Host entries for what was found, pinned, up to where the host is full; reads fill those that the disk has."""
        for entry in found:
            if isinstance(entry, HostEntry):
                self._host.pin(entry)
        entries: list[HostEntry] = []
        records: list[DiskEntry] = []
        targets: list[HostEntry] = []
        for entry in found:
            if isinstance(entry, DiskEntry):
                header = entry.header
                target = self._host.reserve(header.hash, header.parent, header.tokens, salt)
                if target is None:
                    break
                self._host.pin(target)
                records.append(entry)
                targets.append(target)
                entries.append(target)
            else:
                entries.append(entry)
        for entry in found[len(entries) :]:
            if isinstance(entry, HostEntry):
                self._host.unpin(entry)
        if self._disk is not None and records:
            self._reads[self._disk.start_read(records, [target.slot for target in targets])] = targets
            self._filling.update(targets)
        return entries

    def wait_for(self, request: Request, entries: list[HostEntry], first: int) -> None:
        """Keep a load, with the pins of its entries, until all of them are filled."""
        self._waiting.append(Arrival(entries, first, request))

    def end_read(self, read: DiskJob) -> list[HostEntry]:
        """A read has ended: what it filled is clean. Those that it did not fill, which are still pinned for it."""
        targets = self._reads.pop(read)
        self._filling.difference_update(targets)
        for entry in targets[: len(read.headers)]:
            self._host.written(entry)
        return targets[len(read.headers) :]

    def ready(self) -> Iterator[Arrival]:
        """Loads that wait for nothing any more, with what of them is usable: up to the first block that was lost."""
        for arrival in [each for each in self._waiting if all(entry.clean or entry.lost for entry in each.entries)]:
            self._waiting.remove(arrival)
            usable = [] if arrival.request is None else [*takewhile(lambda entry: not entry.lost, arrival.entries)]
            for entry in reversed(arrival.entries[len(usable) :]):
                self._host.unpin(entry)
            arrival.entries = usable
            yield arrival

    def forget(self, request: Request) -> None:
        """A request has ended: what is being read for it is for nobody."""
        for arrival in self._waiting:
            if arrival.request is request:
                arrival.request = None

    def pinned(self) -> list[HostEntry]:
        """Host entries as often as reads and loads have pinned them."""
        held = [*self._reads.values(), *(arrival.entries for arrival in self._waiting)]
        return [entry for entries in held for entry in entries]
