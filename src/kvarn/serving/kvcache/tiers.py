"""Device memory and host memory as one cache: mirrors blocks to the host, and brings them back.

A full block of KV never changes, so a copy of it stays true. `mirror` queues copies of a running request's full blocks;
a request whose blocks all have one can be taken off the device at once, for the price of recomputing what its last,
partial block holds. `load` brings a waiting request's blocks back. Copies run beside the compute and end in `collect`.

What keeps it safe: a copy holds a reference of its own on every device block and a pin on every host slot it touches,
so neither can be given to anybody else before the copy has ended, whatever happens to the request meanwhile. A copy
that fails or was dropped only costs a recomputation; nothing waits for the host to have room.

Source: TokenFlow (arXiv 2510.02758), section 5, with content-addressed slots instead of its per-request pools.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import attrgetter

from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.copies import Copier, CopyJob, CopyRules, Direction
from kvarn.serving.kvcache.host import HostEntry, HostIndex
from kvarn.serving.request import Request

_COPY_MEMORY = 0.8
"""What the copies so far count for in the average when one more has ended."""
_FIRST_GUESS = 1e-4
"""Seconds to copy a block, before one has been copied."""


@dataclass(slots=True)
class _Flight:
    """A copy under way: what it pins, and whom it is for if it brings a request back."""

    entries: list[HostEntry]
    request: Request | None = None


@dataclass(slots=True)
class TierCounters:
    """Totals since start, in blocks and seconds of copying."""

    written_blocks: int = 0
    read_blocks: int = 0
    write_seconds: float = 0.0
    read_seconds: float = 0.0
    failed_copies: int = 0


class Tiers:
    """Host slots behind one KVCache. Called by the engine alone."""

    def __init__(
        self,
        cache: KVCache,
        num_slots: int,
        copier: Copier,
        *,
        block_bytes: int = 0,
        rules: CopyRules = CopyRules(),
    ) -> None:
        """`block_bytes` of KV in a block: for statistics."""
        self.rules = rules
        self.cache = cache
        self.block_bytes = block_bytes
        self.host = HostIndex(num_slots)
        self.copier = copier
        self.counters = TierCounters()
        self.block_seconds = dict.fromkeys(Direction, _FIRST_GUESS)
        """What copying a block has lately taken, each way."""
        self.blocks_in_flight = dict.fromkeys(Direction, 0)
        """Blocks queued or being copied, each way."""
        self._mirrors: dict[str, list[HostEntry]] = {}
        self._flights: dict[CopyJob, _Flight] = {}
        self._barred: set[str] = set()
        """Requests that failed to load: they are computed, lest they try for ever."""

    @property
    def copying(self) -> bool:
        """Whether any copy is under way."""
        return bool(self._flights)

    @property
    def copies_first(self) -> bool:
        """Whether the step must wait for the copies under way, as they may not run beside the compute."""
        return not self.rules.overlap and self.copying

    def queue_seconds(self, direction: Direction, blocks: int) -> float:
        """Until so many more blocks would be copied, behind what is queued."""
        return (self.blocks_in_flight[direction] + blocks) * self.block_seconds[direction]

    def held_blocks(self) -> list[int]:
        """Device blocks that copies hold, as often as they hold them."""
        return [block for job in self._flights for block in job.blocks]

    def unmirrored(self, request: Request) -> int:
        """Full blocks of a running request that have no copy on the host, finished or under way."""
        return request.num_computed // self.cache.block_size - len(self._mirrors.get(request.id, ()))

    def mirror(self, request: Request, limit: int) -> int:
        """Queue copies of at most `limit` of a running request's full blocks that have none; how many were queued.

        In the order of their tokens, so that what is on the host is always a prefix. Stops where the host is full.
        """
        size, mirrors = self.cache.block_size, self._mirrors.get(request.id, [])
        self._barred.discard(request.id)
        full = request.num_computed // size
        if len(mirrors) >= full:
            return 0
        salt = self.cache.salt(request)
        hashes = self.cache.hashes(request, full)
        blocks: list[int] = []
        entries: list[HostEntry] = []
        starts: list[int] = []
        while len(mirrors) < full and len(blocks) < limit:
            i = len(mirrors)
            key, parent = hashes[i], hashes[i - 1] if i else b""
            tokens = request.tokens[i * size : (i + 1) * size].tobytes()
            entry = self.host.find(key, parent, tokens, salt)
            if entry is None:
                entry = self.host.reserve(key, parent, tokens, salt)
                if entry is None:
                    break
                blocks.append(int(request.block_table[i]))
                entries.append(entry)
                starts.append(i * size)
            self.host.pin(entry)
            mirrors.append(entry)
        if mirrors:
            self._mirrors[request.id] = mirrors
        if blocks:
            self._start(Direction.TO_HOST, blocks, entries, starts)
        return len(blocks)

    def write_ahead(self, running: Sequence[Request], now: float, seconds: float) -> None:
        """Copy new blocks, as many as a step of so many seconds has time for, of those who can soonest do without."""
        if self.rules.write_ahead == "off":
            return
        room = int(seconds / self.block_seconds[Direction.TO_HOST]) - self.blocks_in_flight[Direction.TO_HOST]
        if room > 0 and self.rules.write_ahead == "most slack first":
            running = sorted(running, key=lambda request: -request.reader.slack(now))
        for request in running:
            if room <= 0:
                return
            room -= self.mirror(request, room)

    def loadable_tokens(self, request: Request) -> int:
        """Leading tokens of a waiting request that device and host hold together."""
        hit = self.cache.lookup(request).tokens // self.cache.block_size
        return (hit + len(self._host_match(request, hit))) * self.cache.block_size

    def load(self, request: Request) -> bool:
        """Start bringing a waiting request's blocks back from the host, on top of what the device still holds.

        The request then holds device blocks for all of them, and `collect` tells when they are filled. False, and
        nothing changed, when the host has nothing more than the device or the device has no room.
        """
        cache, size = self.cache, self.cache.block_size
        hit = cache.lookup(request).tokens // size
        entries = self._host_match(request, hit)
        if not entries:
            return False
        cache.admit(request)
        if not cache.grow(request, (hit + len(entries)) * size):
            cache.release(request)
            return False
        for entry in entries:
            self.host.pin(entry)
        blocks = request.block_table[hit : hit + len(entries)].tolist()
        starts = [i * size for i in range(hit, hit + len(entries))]
        self._start(Direction.TO_DEVICE, blocks, entries, starts, request)
        return True

    def collect(self) -> list[tuple[Request, bool]]:
        """End the copies that are done. Requests that `load` was called for: whether their blocks are filled now."""
        arrived = []
        for job in self.copier.finished():
            flight = self._flights.pop(job)
            self.blocks_in_flight[job.direction] -= len(job.blocks)
            failed = job.error is not None
            self.counters.failed_copies += failed
            if failed:
                self._drop(flight.entries)
            for entry in flight.entries if not failed else ():
                if job.direction is Direction.TO_HOST:
                    self.host.written(entry)
                else:
                    self.host.unpin(entry)
            self._count(job)
            self.cache.pool.release(job.blocks, keep=self.cache.index.__contains__)
            if flight.request is not None:
                if failed:
                    self._barred.add(flight.request.id)
                else:
                    self.cache.fill(flight.request, len(job.blocks))
                arrived.append((flight.request, not failed))
        return arrived

    def forget(self, request: Request) -> None:
        """A request has ended: its host blocks stay as long as there is room; what is being loaded is for nobody."""
        for flight in self._flights.values():
            if flight.request is request:
                flight.request = None
        self._barred.discard(request.id)
        for entry in reversed(self._mirrors.pop(request.id, [])):
            self.host.unpin(entry)

    def wait(self, seconds: float) -> None:
        """Return when a copy has ended, or after `seconds`; at once when none is under way."""
        if self.copying:
            self.copier.wait(seconds)

    def close(self) -> None:
        """End the copies and what makes them."""
        self.copier.close()
        self.collect()

    def check(self, holders: Iterable[Request]) -> None:
        """Raise AssertionError unless the books agree with one another and with the device's."""
        self.host.check()
        self.cache.check(holders, self.held_blocks())
        pins: dict[HostEntry, int] = {}
        for entries in (*self._mirrors.values(), *(flight.entries for flight in self._flights.values())):
            for entry in entries:
                pins[entry] = pins.get(entry, 0) + 1
        assert all(entry.pins == count for entry, count in pins.items()), "pins are lost"

    # ---- small parts -------------------------------------------------------------------------------------

    def _drop(self, entries: list[HostEntry]) -> None:
        """Forget host blocks whose content is wrong; of who mirrored them, those behind no longer count."""
        for entry in entries:
            self.host.drop(entry)
        for mirrors in self._mirrors.values():
            for i, entry in enumerate(mirrors):
                if entry.lost:
                    for other in mirrors[i:]:
                        self.host.unpin(other)
                    del mirrors[i:]
                    break

    def _host_match(self, request: Request, first: int) -> list[HostEntry]:
        if request.id in self._barred:
            return []
        usable = (request.num_tokens - 1) // self.cache.block_size  # the last token is always computed
        # Its own copies need not be looked for: they are pinned.
        own = self._mirrors.get(request.id, [])[first:usable]
        found = list(takewhile(attrgetter("clean"), own))
        if len(found) < len(own) or first + len(found) >= usable:
            return found
        hashes = self.cache.hashes(request, usable)[:usable]
        salt = self.cache.salt(request)
        found += self.host.match(hashes, request.tokens, self.cache.block_size, salt, first + len(found))
        return found

    def _start(
        self,
        direction: Direction,
        blocks: list[int],
        entries: list[HostEntry],
        starts: list[int],
        request: Request | None = None,
    ) -> None:
        self.cache.pool.acquire(blocks)
        job = CopyJob(direction, blocks, [entry.slot for entry in entries], starts)
        self._flights[job] = _Flight(entries, request)
        self.blocks_in_flight[direction] += len(blocks)
        self.copier.start(job)

    def _count(self, job: CopyJob) -> None:
        count = len(job.blocks)
        if job.direction is Direction.TO_HOST:
            self.counters.written_blocks += count
            self.counters.write_seconds += job.seconds
        else:
            self.counters.read_blocks += count
            self.counters.read_seconds += job.seconds
        if job.error is None:
            before = self.block_seconds[job.direction]
            self.block_seconds[job.direction] = _COPY_MEMORY * before + (1 - _COPY_MEMORY) * job.seconds / count


class TierBooks:
    """What a policy may know of the tiers, by request id. See kvarn.serving.policies.protocol.TierView."""

    def __init__(self, tiers: Tiers, requests: Mapping[str, Request]) -> None:
        self._tiers = tiers
        self._requests = requests

    @property
    def host_blocks(self) -> int:
        return self._tiers.host.num_slots

    @property
    def coming_blocks(self) -> int:
        pool = self._tiers.cache.pool
        return sum(pool.references(block) == 1 for block in self._tiers.held_blocks())

    def loadable_tokens(self, id: str) -> int:
        return self._tiers.loadable_tokens(self._requests[id])

    def unmirrored_blocks(self, id: str) -> int:
        return self._tiers.unmirrored(self._requests[id])

    def write_seconds(self, blocks: int) -> float:
        return self._tiers.queue_seconds(Direction.TO_HOST, blocks)

    def read_seconds(self, blocks: int) -> float:
        return self._tiers.queue_seconds(Direction.TO_DEVICE, blocks)
