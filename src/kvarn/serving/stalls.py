"""Conversations whose agents wait for a tool: holds their KV, moves it, lets it go. Done here, decided by a policy.

Each call (kvarn.serving.agents.lifecycle) has a stand-in: a request that never runs, with the conversation's tokens,
which holds device blocks and host slots as any request does. So a copy can fail, be late or be overtaken, and what
`Tiers` promises of every request is true of it. What the next request needs it finds in the prefix index.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvarn.serving.agents.lifecycle import ON_DEVICE, Call, CallState
from kvarn.serving.agents.moves import StallMove
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.tiers import Tiers
from kvarn.serving.request import Request
from kvarn.serving.sampling.params import SamplingParams


@dataclass(slots=True, eq=False)
class Stall:
    """A call and what stands in for its conversation."""

    call: Call
    request: Request
    reserved: list[int]
    """Device blocks held for its return, without content."""
    least_tokens: int
    """Tokens that a request goes on from it with at least: the question and the first token of its answer."""
    end: bytes = b""
    """Hash of its last full block; empty where none is shared."""

    @property
    def id(self) -> str:
        return self.call.id

    @property
    def held_blocks(self) -> int:
        """Device blocks held for it, shared ones included."""
        return self.request.num_blocks + len(self.reserved)

    @property
    def reserved_blocks(self) -> int:
        return len(self.reserved)


@dataclass(slots=True)
class StallCounters:
    """Totals since start."""

    offloads: int = 0
    releases: int = 0
    uploads: int = 0
    """Conversations brought back before a request came for them."""
    failed_uploads: int = 0
    wasted_uploads: int = 0
    """Those given up again before a request came."""


class Stalls:
    """All stalls of one engine."""

    def __init__(self, cache: KVCache, tiers: Tiers | None) -> None:
        self.cache = cache
        self.tiers = tiers
        self.counters = StallCounters()
        self._stalls: dict[str, Stall] = {}
        self._of_stand_in: dict[str, Stall] = {}
        self._by_end: dict[bytes, list[str]] = {}
        """The hash of conversations' last full block -> their calls."""

    def __iter__(self) -> Iterator[Stall]:
        return iter(self._stalls.values())

    def __len__(self) -> int:
        return len(self._stalls)

    def get(self, id: str) -> Stall | None:
        return self._stalls.get(id)

    def begin(self, call: Call, ended: Request) -> None:
        """Hold what the device has of an ended request's conversation."""
        stand_in = Request.create(
            f"stall {call.id}", ended.tokens[: ended.num_tokens], SamplingParams(max_tokens=1), arrival=ended.arrival,
            tenant=ended.tenant,
        )  # fmt: skip
        stand_in.block_hashes = list(ended.block_hashes)
        stand_in.preemptions = 1  # its look-ups are nobody's prefix hits
        self.cache.admit(stand_in)
        stall = self._stalls[call.id] = Stall(call, stand_in, [], min(ended.prompt_length + 1, ended.num_tokens))
        self._of_stand_in[stand_in.id] = stall
        full = stand_in.num_tokens // self.cache.block_size
        if full and self.cache.share_prefixes:
            stall.end = self.cache.hashes(stand_in, full)[full - 1]
            self._by_end.setdefault(stall.end, []).append(call.id)
        if self.tiers is not None and self.tiers.rules.write_ahead != "off":
            self.tiers.mirror(stand_in, stand_in.num_tokens)

    def end(self, call: Call) -> None:
        """The call is over: nothing is held any more."""
        stall = self._stalls.pop(call.id, None)
        if stall is None:
            return
        del self._of_stand_in[stall.request.id]
        if stall.end:
            self._by_end[stall.end].remove(call.id)
            if not self._by_end[stall.end]:
                del self._by_end[stall.end]
        self._let_go(stall)
        if self.tiers is not None:
            self.tiers.forget(stall.request)

    def prefix_of(self, request: Request) -> str:
        """The call whose conversation a new request begins with, found by content; empty for none.

        Its full blocks must be the same, and of its answer at least the first token: others ask the same question.
        """
        if not self._by_end:
            return ""
        hashes = self.cache.hashes(request, request.num_tokens // self.cache.block_size)
        for key in reversed(hashes):
            alike = [id for id in self._by_end.get(key, ()) if self._begins_alike(request, self._stalls[id])]
            if alike:  # of equal ones, one that nobody goes on from yet
                return min(alike, key=lambda id: bool(self._stalls[id].call.successor))
        return ""

    def owns(self, request: Request) -> bool:
        """Whether a request is a stand-in."""
        return request.id in self._of_stand_in

    def uploaded(self, request: Request, filled: bool, now: float) -> None:
        """The copies of an upload have ended."""
        stall = self._of_stand_in[request.id]
        if filled:
            stall.call.move_to(CallState.READY, now)
            self.counters.uploads += 1
        else:
            self.cache.release(request)
            self.counters.failed_uploads += 1
            stall.call.move_to(CallState.OFFLOADED, now)

    def note_copies(self, now: float) -> None:
        """Offloads whose copies have ended."""
        for stall in self._stalls.values():
            if stall.call.state is CallState.OFFLOADING and not self._is_leaving(stall):
                stall.call.move_to(CallState.OFFLOADED, now)

    def apply(self, move: StallMove, now: float) -> None:
        """Do one move; one that is not possible any more, because copies or requests came in between, is left."""
        stall = self._stalls.get(move.id)
        if stall is None:
            return
        state = stall.call.state
        match move.verb:
            case "offload" if state in ON_DEVICE:
                self._offload(stall, now)
            case "offload" if state is CallState.RESERVING:
                self._retreat(stall, now)
            case "release" | "discard" if state not in (CallState.RELEASED, CallState.UPLOADING):
                self._release(stall, now, discard=move.verb == "discard")
            case "reserve" if state in (CallState.OFFLOADED, CallState.RESERVING):
                self._reserve(stall, move.blocks, now)
            case "upload" if state in (CallState.OFFLOADED, CallState.RESERVING):
                self._upload(stall, now)
            case "retreat" if state in (CallState.RESERVING, CallState.READY):
                self._retreat(stall, now)
            case _:
                pass

    # ---- numbers -----------------------------------------------------------------------------------------

    def reclaimable(self, stall: Stall) -> int:
        """Blocks that letting go of it makes available."""
        return self.cache.reclaimable(stall.request) + len(stall.reserved)

    def holders(self) -> tuple[list[Request], list[int]]:
        """Stand-ins that hold blocks, and blocks that are reserved: for checks of block tables."""
        reserved = [block for stall in self._stalls.values() for block in stall.reserved]
        return [stall.request for stall in self._stalls.values() if stall.request.num_blocks], reserved

    def states(self) -> dict[str, int]:
        """Device blocks held by stalls alone that are not on their way back: "stalled" and "reserved"."""
        stalled = reserved = 0
        for stall in self._stalls.values():
            reserved += len(stall.reserved)
            if stall.call.state is not CallState.UPLOADING:
                stalled += self.cache.reclaimable(stall.request)
        return {"stalled": stalled, "reserved": reserved}

    def loading(self) -> list[Request]:
        """Stand-ins whose blocks are on their way back."""
        return [stall.request for stall in self._stalls.values() if stall.call.state is CallState.UPLOADING]

    def _begins_alike(self, request: Request, stall: Stall) -> bool:
        count = stall.least_tokens
        return count <= request.num_tokens and np.array_equal(request.tokens[:count], stall.request.tokens[:count])

    # ---- moves -------------------------------------------------------------------------------------------

    def _offload(self, stall: Stall, now: float) -> None:
        if self.tiers is None:
            self._release(stall, now, discard=False)
            return
        if stall.call.state is CallState.READY:
            self.counters.wasted_uploads += 1
            self.cache.release(stall.request)
            stall.call.move_to(CallState.OFFLOADED, now)
            return
        self.tiers.offload([stall.request], [], now)
        self.cache.release(stall.request)
        self.counters.offloads += 1
        stall.call.move_to(CallState.OFFLOADING, now)
        if not self._is_leaving(stall):
            stall.call.move_to(CallState.OFFLOADED, now)

    def _release(self, stall: Stall, now: float, *, discard: bool) -> None:
        if discard:
            self.cache.discard(stall.request)
        self._let_go(stall)
        if self.tiers is not None:
            self.tiers.forget(stall.request)
        self.counters.releases += 1
        stall.call.move_to(CallState.RELEASED, now)

    def _reserve(self, stall: Stall, blocks: int, now: float) -> None:
        taken = self.cache.pool.allocate(blocks)
        if taken is None:
            return
        stall.reserved += taken
        if stall.call.state is CallState.OFFLOADED:
            stall.call.move_to(CallState.RESERVING, now)

    def _upload(self, stall: Stall, now: float) -> None:
        """What is reserved goes back to the pool and is taken again at once: by what is copied, or by nobody."""
        self._free_reserved(stall)
        assert self.tiers is not None
        request = stall.request
        if self.tiers.load(request):
            stall.call.move_to(CallState.UPLOADING, now)
            return
        if stall.call.state is CallState.RESERVING:
            stall.call.move_to(CallState.OFFLOADED, now)
        usable = (request.num_tokens - 1) // self.cache.block_size
        hit = self.cache.lookup(request).tokens // self.cache.block_size
        if hit and (hit >= usable or not self.tiers.loadable_tokens(request) > hit * self.cache.block_size):
            self.cache.admit(request)  # it had not left the device
            stall.call.move_to(CallState.READY, now)

    def _retreat(self, stall: Stall, now: float) -> None:
        if stall.call.state is CallState.READY:
            self.counters.wasted_uploads += 1
        self._let_go(stall)
        stall.call.move_to(CallState.OFFLOADED, now)

    def _let_go(self, stall: Stall) -> None:
        self._free_reserved(stall)
        if stall.request.num_blocks:
            self.cache.release(stall.request)

    def _free_reserved(self, stall: Stall) -> None:
        self.cache.pool.release(stall.reserved, keep=lambda block: False)
        stall.reserved = []

    def _is_leaving(self, stall: Stall) -> bool:
        """Whether copies to the host of this conversation are under way."""
        return self.tiers is not None and self.tiers.is_leaving(stall.request)
