"""Device memory, host memory and disk as one cache: mirrors blocks to the host, and brings them back.

A full block of KV never changes, so a copy of it stays true. `mirror` queues copies of a running request's full blocks;
a request whose full blocks all have one gives up its blocks with one copy more, that of its last, partial block, its
tail (`offload`). `load` brings a waiting request's blocks back. Copies run beside the compute and end in `collect`.
With a disk (kvarn.serving.kvcache.disk), what comes to the host is written there as well, and what only the disk has is
read to the host before it is copied on.

What keeps it safe: a copy holds a reference of its own on every device block and a pin on every host slot it touches,
so neither can be given to anybody else before the copy has ended, whatever happens to the request meanwhile. A copy
that fails or was dropped only costs a recomputation; nothing waits for the host to have room.

Source: TokenFlow (arXiv 2510.02758), section 5, with content-addressed slots instead of its per-request pools.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from operator import attrgetter
from time import monotonic

from kvarn.serving.kvcache.arrivals import Arrivals
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.copies import Copier, CopyJob, CopyRules, Direction
from kvarn.serving.kvcache.disk import DiskEntry, DiskTier
from kvarn.serving.kvcache.host import HostEntry, HostIndex
from kvarn.serving.kvcache.host_copies import HostCopies
from kvarn.serving.kvcache.prefix import leading
from kvarn.serving.request import Request

_COPY_MEMORY = 0.8
"""What the copies so far count for in the average when one more has ended."""
_FIRST_GUESS = 1e-4
"""Seconds to copy a block, before one has been copied."""
_TOKEN_BYTES = 4
_FLUSH_SECONDS = 5.0
"""What the disk may take at the end to write what the host has and it has not."""


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


@dataclass(frozen=True, slots=True)
class KVPlaces:
    """Leading blocks of one request's KV on each tier; most are on several."""

    device: int
    """Also partly filled ones."""
    host: int = 0
    disk: int = 0


class Tiers:
    """Host slots, and perhaps a disk, behind one KVCache. Called by the engine alone."""

    def __init__(
        self,
        cache: KVCache,
        num_slots: int,
        copier: Copier,
        *,
        block_bytes: int = 0,
        disk: DiskTier | None = None,
        rules: CopyRules = CopyRules(),
    ) -> None:
        """`block_bytes` of KV in a block: for statistics."""
        self.rules = rules
        self.cache = cache
        self.block_bytes = block_bytes
        self.host = HostIndex(num_slots)
        self.copier = copier
        self.disk = disk
        self.counters = TierCounters()
        self.block_seconds = dict.fromkeys(Direction, _FIRST_GUESS)
        """What copying a block has lately taken, each way."""
        self.blocks_in_flight = dict.fromkeys(Direction, 0)
        """Blocks queued or being copied, each way."""
        self._host_copies = HostCopies(cache, self.host, partial(self._start, Direction.TO_HOST))
        self._flights: dict[CopyJob, _Flight] = {}
        self._arrivals = Arrivals(self.host, disk)
        self._barred: set[str] = set()
        """Requests that failed to load: they are computed, lest they try for ever."""

    @property
    def copying(self) -> bool:
        """Whether any copy, to the disk too, is under way or to be made."""
        return bool(self._flights or self._arrivals or (self.disk is not None and self.disk.writing))

    @property
    def copies_first(self) -> bool:
        """Whether the step must wait for the copies under way, as they may not run beside the compute."""
        return not self.rules.overlap and bool(self._flights)

    def queue_seconds(self, direction: Direction, blocks: int) -> float:
        """Until so many more blocks would be copied, behind what is queued."""
        return (self.blocks_in_flight[direction] + blocks) * self.block_seconds[direction]

    def held_blocks(self) -> list[int]:
        """Device blocks that copies hold, as often as they hold them."""
        return [block for job in self._flights for block in job.blocks]

    def unmirrored(self, request: Request) -> int:
        """Blocks of a running request that have no copy on the host, finished or under way; a partial one counts."""
        return self.cache.blocks_for(request.exact_tokens) - len(self._host_copies.of(request))

    def is_leaving(self, request: Request) -> bool:
        """Whether copies to the host that are kept for a request are under way."""
        return not all(entry.clean for entry in self._host_copies.of(request))

    def mirror(self, request: Request, limit: int) -> int:
        """Queue copies of at most `limit` of a running request's full blocks that have none; how many were queued.

        In the order of their tokens, so that what is on the host is always a prefix. Stops where the host is full.
        """
        self._barred.discard(request.id)
        return self._host_copies.extend(request, limit)

    def offload(self, leaving: Sequence[Request], staying: Sequence[Request], now: float) -> None:
        """Queue copies of all that is new of requests that are about to leave the device.

        Where the host is full, those who stay on it give up copies that they have there: who runs dry first before the
        others, for he is the last to leave; the ends first, so that what is left is a prefix.
        """
        missing = sum(map(self.unmirrored, leaving)) - self.host.num_available
        for request in sorted(staying, key=lambda request: request.reader.slack(now)) if missing > 0 else ():
            missing -= self._host_copies.give_up(request, missing)
        for request in leaving:
            self._barred.discard(request.id)
            self._host_copies.put_away(request)

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

    def write_last(self, request: Request) -> None:
        """Copy what is new of a running request that is to end: the next turn of a conversation begins with it."""
        if self.rules.write_ahead != "off":
            self.mirror(request, request.num_tokens)

    def loadable_tokens(self, request: Request) -> int:
        """Leading tokens of a waiting request that all tiers hold together."""
        hit = self.cache.lookup(request)
        if request.layout is not None and request.layout.resumed:
            return hit.tokens  # all of its prefix comes with what is kept for it
        return hit.tokens + sum(map(_tokens_in, self._match(request, hit.blocks)))

    def places(self, request: Request) -> KVPlaces:
        """Where the KV of a request is now, each tier counted by itself."""
        hashes = self.cache.hashes(request, request.num_tokens // self.cache.block_size)
        disk = 0 if self.disk is None else leading(hashes, self.disk.holds)
        return KVPlaces(self.cache.device_blocks(request), leading(hashes, self.host.holds), disk)

    def load_seconds(self, request: Request, blocks: int) -> float:
        """Until all the `blocks` that a waiting request may load would be on the device, behind what is queued."""
        seconds = self.queue_seconds(Direction.TO_DEVICE, blocks)
        if self.disk is not None:  # only then it matters which
            found = self._match(request, self._cached_blocks(request))
            seconds += self.disk.read_seconds(sum(isinstance(entry, DiskEntry) for entry in found))
        return seconds

    def load(self, request: Request) -> bool:
        """Start bringing a waiting request's blocks back, on top of what the device still holds.

        The request then holds device blocks for all of them, and `collect` tells when they are filled. False, and
        nothing changed, when the other tiers have nothing more than the device, or device or host have no room.
        """
        cache, first = self.cache, self._cached_blocks(request)
        found = self._match(request, first)
        if not found:
            return False
        cache.admit(request)
        tokens = (first + len(found)) * cache.block_size - request.slot_surplus
        if request.layout is not None and request.layout.copies:
            tokens = request.prompt_length  # copies of segments stand behind
        if not cache.grow(request, tokens):
            cache.release(request)
            return False
        entries = self._arrivals.gather(found, cache.salt(request))
        if not entries:
            cache.release(request)
            self._barred.add(request.id)
            return False
        if all(entry.clean for entry in entries):
            self._copy_to_device(request, entries, first)
        else:
            self._arrivals.wait_for(request, entries, first)
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
                    if self.disk is not None and _tokens_in(entry) == self.cache.block_size:
                        self.disk.offer(entry)
                else:
                    self.host.unpin(entry)
            self._count(job)
            self.cache.pool.release(job.blocks, keep=self.cache.index.__contains__)
            if flight.request is not None:
                if failed:
                    self._barred.add(flight.request.id)
                else:
                    self.cache.fill(flight.request, sum(map(_tokens_in, flight.entries)))
                    self._host_copies.drop_tail(flight.request)
                arrived.append((flight.request, not failed))
        for read in self.disk.collect(self.host) if self.disk is not None else ():
            self._drop(self._arrivals.end_read(read))
            arrived += self._copy_ready()
        return arrived

    def forget(self, request: Request) -> None:
        """A request has ended: its host blocks stay as long as there is room; what is being loaded is for nobody."""
        for flight in self._flights.values():
            if flight.request is request:
                flight.request = None
        self._arrivals.forget(request)
        self._barred.discard(request.id)
        self._host_copies.forget(request)

    def wait(self, seconds: float) -> None:
        """Return when something that a request may wait for has ended, or after `seconds`; at once without any."""
        if self._flights:
            self.copier.wait(seconds)
        elif self._arrivals and self.disk is not None:
            self.disk.io.wait(seconds)

    def close(self) -> None:
        """End the copies and what makes them; what the host has goes to the disk, as far as a few seconds allow."""
        self.copier.close()
        self.collect()
        if self.disk is not None:
            until = monotonic() + _FLUSH_SECONDS
            while self.disk.writing and monotonic() < until:
                self.disk.io.wait(0.1)
                self.disk.collect(self.host)
            self.disk.io.close()

    def check(self, holders: Iterable[Request], also_held: Sequence[int] = ()) -> None:
        """Raise AssertionError unless the books agree with one another and with the device's.

        `also_held`: device blocks that neither holders nor copies reference.
        """
        self.host.check()
        self.cache.check(holders, [*self.held_blocks(), *also_held])
        pins: dict[HostEntry, int] = {}
        held = [self._host_copies.pinned(), self._arrivals.pinned()]
        held += [flight.entries for flight in self._flights.values()]
        if self.disk is not None:
            held.append(self.disk.pinned())
            self.disk.index.check()
        for entries in held:
            for entry in entries:
                pins[entry] = pins.get(entry, 0) + 1
        assert all(entry.pins == count for entry, count in pins.items()), "pins are lost"

    # ---- small parts -------------------------------------------------------------------------------------

    def _drop(self, entries: list[HostEntry]) -> None:
        """Forget host blocks whose content is wrong; of who mirrored them, those behind no longer count."""
        for entry in entries:
            self.host.drop(entry)
        self._host_copies.drop_lost()

    def _cached_blocks(self, request: Request) -> int:
        return self.cache.lookup(request).blocks

    def _match(self, request: Request, first: int) -> list[HostEntry | DiskEntry]:
        """Where the blocks of a request from number `first` on are, or are being read to, up to the first missing."""
        if request.id in self._barred:
            return []
        found = self._match_full(request, first)
        tail, last = self._host_copies.tail(request), first + len(found)
        if tail is not None and tail.clean and tail.parent == (request.block_hashes[last - 1] if last else b""):
            found.append(tail)
        return found

    def _match_full(self, request: Request, first: int) -> list[HostEntry | DiskEntry]:
        size, salt = self.cache.block_size, self.cache.salt(request)
        usable = min(request.num_tokens - 1, request.exact_limit) // size  # the last token is always computed
        # Its own copies need not be looked for: they are pinned.
        own = self._host_copies.of(request)[first:usable]
        found: list[HostEntry | DiskEntry] = [*takewhile(attrgetter("clean"), own)]
        if len(found) < len(own) or first + len(found) >= usable:
            return found
        first += len(found)
        hashes = self.cache.hashes(request, usable)
        content, width = request.tokens[first * size : usable * size].tobytes(), _TOKEN_BYTES * size
        for i in range(first, usable):
            key, parent = hashes[i], hashes[i - 1] if i else b""
            tokens = content[(i - first) * width : (i - first + 1) * width]
            entry = self.host.find(key, parent, tokens, salt)
            if entry is not None and (entry.clean or self._arrivals.is_filling(entry)):
                found.append(entry)
                continue
            record = self.disk.find(key, parent, tokens, salt) if self.disk is not None and entry is None else None
            if record is None:
                break
            found.append(record)
        return found

    def _copy_ready(self) -> list[tuple[Request, bool]]:
        """Copy to the device what loads waited for; news of the requests that get nothing."""
        news = []
        for arrival in self._arrivals.ready():
            if arrival.request is not None and arrival.entries:
                self._copy_to_device(arrival.request, arrival.entries, arrival.first)
            elif arrival.request is not None:
                self._barred.add(arrival.request.id)
                news.append((arrival.request, False))
        return news

    def _copy_to_device(self, request: Request, entries: list[HostEntry], first: int) -> None:
        """Into the request's blocks from number `first` on; a pin of each entry is the copy's from now on."""
        blocks = request.block_table[first : first + len(entries)].tolist()
        starts = [i * self.cache.block_size for i in range(first, first + len(entries))]
        self._start(Direction.TO_DEVICE, blocks, entries, starts, request)

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


def _tokens_in(entry: HostEntry | DiskEntry) -> int:
    """Tokens of the block: fewer than a block has room for in a tail."""
    tokens = entry.tokens if isinstance(entry, HostEntry) else entry.header.tokens
    return len(tokens) // _TOKEN_BYTES
