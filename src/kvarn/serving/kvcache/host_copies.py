"""Which blocks of each request have a copy on the host, finished or under way, that is kept for it.

A request's copies are always a prefix of its full blocks. One that leaves the device leaves its last, partial block
there too, its tail. Each has a pin for its request, so it stays until the request ends or gives it up, or it is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.host import HostEntry, HostIndex
from kvarn.serving.request import Request

StartCopies = Callable[[list[int], list[HostEntry], list[int]], None]
"""Starts copies of device blocks to host entries; the last list has the position of the first token of each."""


class HostCopies:
    """Called by the tiers alone."""

    def __init__(self, cache: KVCache, host: HostIndex, start: StartCopies) -> None:
        self._cache = cache
        self._host = host
        self._start = start
        self._of: dict[str, list[HostEntry]] = {}
        self._tails: dict[str, HostEntry] = {}
        """Found by their owners alone, and used once."""

    def of(self, request: Request) -> Sequence[HostEntry]:
        """Copies of the leading full blocks of a request."""
        return self._of.get(request.id, ())

    def tail(self, request: Request) -> HostEntry | None:
        """The copy of the partial last block of a request that was put away."""
        return self._tails.get(request.id)

    def extend(self, request: Request, limit: int) -> int:
        """Queue copies of at most `limit` of a running request's full blocks that have none; how many were queued.

        In the order of their tokens, so that what is on the host is always a prefix. Stops where the host is full.
        """
        size, copies = self._cache.block_size, self._of.get(request.id, [])
        full = request.exact_tokens // size
        if len(copies) >= full:
            return 0
        salt = self._cache.salt(request)
        hashes = self._cache.hashes(request, full)
        blocks: list[int] = []
        entries: list[HostEntry] = []
        starts: list[int] = []
        while len(copies) < full and len(blocks) < limit:
            i = len(copies)
            key, parent = hashes[i], hashes[i - 1] if i else b""
            tokens = request.tokens[i * size : (i + 1) * size].tobytes()
            entry = self._host.find(key, parent, tokens, salt)
            if entry is None:
                entry = self._host.reserve(key, parent, tokens, salt)
                if entry is None:
                    break
                blocks.append(int(request.block_table[i]))
                entries.append(entry)
                starts.append(i * size)
            self._host.pin(entry)
            copies.append(entry)
        if copies:
            self._of[request.id] = copies
        if blocks:
            self._start(blocks, entries, starts)
        return len(blocks)

    def put_away(self, request: Request) -> None:
        """Queue copies of all that a running request holds and the host does not: it gives up its blocks."""
        size, full = self._cache.block_size, request.exact_tokens // self._cache.block_size
        self.extend(request, full)
        self.drop_tail(request)
        if request.layout is not None or request.num_computed == full * size or len(self.of(request)) < full:
            return
        parent = self._cache.hashes(request, full)[full - 1] if full else b""
        tokens = request.tokens[full * size : request.num_computed].tobytes()
        tail = self._host.reserve(f"tail {request.id}".encode(), parent, tokens, self._cache.salt(request))
        if tail is not None:
            self._host.pin(tail)
            self._tails[request.id] = tail
            self._start([int(request.block_table[full])], [tail], [full * size])

    def give_up(self, request: Request, count: int) -> int:
        """Let go of a request's last copies until `count` slots may be evicted for it; how many may be."""
        copies = self._of.get(request.id, [])
        given = 0
        while given < count and copies and copies[-1].clean and copies[-1].pins == 1:
            self._host.unpin(copies.pop())
            given += 1
        return given

    def drop_tail(self, request: Request) -> None:
        """It is used, or will be out of date."""
        if tail := self._tails.pop(request.id, None):
            self._host.drop(tail)

    def drop_lost(self) -> None:
        """Let go of what is lost, and of copies behind it: they are no prefix any more."""
        for copies in self._of.values():
            for i, entry in enumerate(copies):
                if entry.lost:
                    for other in copies[i:]:
                        self._host.unpin(other)
                    del copies[i:]
                    break
        for id in [id for id, tail in self._tails.items() if tail.lost]:
            self._host.unpin(self._tails.pop(id))

    def forget(self, request: Request) -> None:
        """A request has ended: its copies stay on the host as long as there is room."""
        self.drop_tail(request)
        for entry in reversed(self._of.pop(request.id, [])):
            self._host.unpin(entry)

    def pinned(self) -> list[HostEntry]:
        """Host entries as often as they have a pin for a request."""
        return [*self._tails.values(), *(entry for copies in self._of.values() for entry in copies)]
