"""The books of one decision, which every policy keeps: what is granted, who gives way, and what is then left.

A policy says in which order it wants things; this file sees to it that grants fit the step's tokens and the device's
blocks. When a running request finds no block and none is coming, others give way, in an order that is the policy's to
say.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import NamedTuple, TypeGuard

from kvarn.serving.agents.moves import StallMove, Verb
from kvarn.serving.policies.loading import worth_loading
from kvarn.serving.policies.protocol import Decision, Grant, RequestView, Snapshot, StallView


class Offer(NamedTuple):
    """What it takes to admit a waiting request."""

    request: RequestView
    cached_tokens: int
    """On the device already."""
    cached_blocks: int
    """Of its own block table, with them."""
    idle_blocks: int
    """Blocks of these that nobody else uses: taking them leaves so many less."""
    blocks: int
    """Further blocks for all its known tokens."""
    loaded_tokens: int
    """Tokens that are better loaded than computed; 0: everything is computed."""


class Step:
    """Budget and blocks left while a decision is being made.

    running   the snapshot's running requests, those to be served first in front
    givers    running requests, and stalled conversations, in the order in which they keep their blocks: the last one
              gives way first. Asked for once, if blocks are short; as `running` if left out
    offload   whether blocks without a copy on the host are copied there before a request gives them up
    load      whether requests come back from the host, where that costs less than computing them
    """

    def __init__(
        self,
        snapshot: Snapshot,
        running: Sequence[RequestView],
        *,
        givers: Callable[[], Sequence[RequestView | StallView]] | None = None,
        offload: bool = False,
        load: bool = True,
    ) -> None:
        self.snapshot = snapshot
        self.running = running
        self.offload = offload and snapshot.tiers is not None
        self.load = load
        self.budget = snapshot.token_budget
        self.available = snapshot.available_blocks
        self.promised = sum([snapshot.blocks_for(r.num_slots) - r.num_blocks for r in snapshot.loading])
        """Blocks that admitted prompts still need for chunks to come, and loaded ones for what is not loaded."""
        self.num_running = len(running) + len(snapshot.loading)
        self.grants: list[Grant] = []
        self.evicted: dict[str, None] = {}
        self.served: set[str] = set()
        self.computing: list[str] = []
        """Requests whose prompts are being computed or loaded."""
        self.admitted = 0
        """Waiting requests that were granted tokens, or are loaded."""
        self._coming: int | None = None
        self._keepers = givers
        self._givers: list[RequestView | StallView] | None = None
        self.moves: list[StallMove] = []
        """What becomes of stalled conversations."""
        self.moved: set[str] = set()
        """Those of them."""
        self._preempted: list[str] = []
        self._offloaded: list[str] = []
        self._loads: list[str] = []

    @property
    def is_full(self) -> bool:
        return self.num_running >= self.snapshot.max_running or self.budget == 0

    @property
    def coming(self) -> int:
        """Blocks that will be nobody's once copies to the host have ended."""
        if self._coming is None:
            self._coming = 0 if self.snapshot.tiers is None else self.snapshot.tiers.coming_blocks
        return self._coming

    def decision(self, wake_at: float = float("inf")) -> Decision:
        return Decision(
            tuple(self._preempted), tuple(self.grants), tuple(self._offloaded), tuple(self._loads), tuple(self.moves),
            wake_at,
        )  # fmt: skip

    # ---- those that run ----------------------------------------------------------------------------------

    def continue_decoding(self, paused: Container[str] = ()) -> list[RequestView]:
        """Grant every decode row but the paused ones; the running requests that still prefill are returned."""
        decoding, prefilling, needed = [], [], 0
        size = self.snapshot.block_size
        for request in self.running:
            total = request.num_tokens
            if total - request.num_computed > 1:
                prefilling.append(request)
            elif request.id not in paused and request.id not in self.evicted:
                decoding.append(request)
                needed += total + request.slot_surplus > request.num_blocks * size
        while self._is_short_of(needed):
            self._give_way(self._next_giver())
            decoding = [request for request in decoding if request.id not in self.evicted]
            needed = sum(request.num_slots > request.num_blocks * size for request in decoding)
        if needed > self.available:
            decoding, needed = self._supplied(decoding), self.available
        if len(decoding) <= self.budget:
            # Everybody fits, as in nearly every step: the books need no line for each of them.
            self.grants = [Grant(request.id, 1) for request in decoding]
            self.served.update(request.id for request in decoding)
            self.budget -= len(decoding)
            self.available -= needed
        else:
            for request in decoding:
                self.continue_running(request)
        return prefilling

    def continue_running(self, request: RequestView, limit: int | None = None) -> None:
        """Grant the next tokens (at most `limit`) of a running request; others give way if blocks are short.

        It waits where they are coming.
        """
        tokens = min(request.num_uncomputed, self.budget if limit is None else min(limit, self.budget))
        if tokens <= 0 or request.id in self.evicted:
            return
        slots = request.num_computed + tokens + request.slot_surplus
        needed = max(0, self.snapshot.blocks_for(slots) - request.num_blocks)
        while self._is_short_of(needed):
            giver = self._next_giver()
            self._give_way(giver)
            if giver is request:
                return
        if needed > self.available:  # the rest is coming
            self.promised += self.snapshot.blocks_for(request.num_slots) - request.num_blocks
            return
        self._grant(request.id, tokens, needed)
        self.promised += self.snapshot.blocks_for(request.num_slots) - self.snapshot.blocks_for(slots)

    def evict(self, request: RequestView) -> None:
        """Take a running request off the device, through the host where its blocks are copied first."""
        self.evicted[request.id] = None
        self.num_running -= 1
        freed, dirty = self.snapshot.reclaimable_blocks(request.id), 0
        if self.offload:
            assert self.snapshot.tiers is not None
            dirty = self.snapshot.tiers.unmirrored_blocks(request.id)
        (self._offloaded if dirty else self._preempted).append(request.id)
        self.available += max(0, freed - dirty)
        if dirty:
            self._coming = self.coming + min(freed, dirty)

    def withdraw(self, request: RequestView) -> None:
        """Take back what a decoding request was granted, so that it may give way."""
        if request.id in self.served:
            self.served.remove(request.id)
            self.grants = [grant for grant in self.grants if grant.id != request.id]
            self.budget += 1
            self.available += request.num_slots > request.num_blocks * self.snapshot.block_size

    def let_go(self, stall: StallView, verb: Verb) -> None:
        """Take a stalled conversation off the device: "offload" copies first what the host lacks."""
        assert self.snapshot.agents is not None
        freed, dirty = self.snapshot.reclaimable_blocks(stall.id), 0
        if verb == "offload":
            dirty = self.snapshot.agents.unmirrored_blocks(stall.id)
        self.moves.append(StallMove(stall.id, verb))
        self.moved.add(stall.id)
        self.available += max(0, freed - dirty)
        if dirty:
            self._coming = self.coming + min(freed, dirty)

    def _give_way(self, giver: RequestView | StallView) -> None:
        if _is_stall(giver):
            self.let_go(giver, "offload" if self.offload else "release")
        else:
            self.evict(giver)  # type: ignore[arg-type]

    # ---- those that wait ---------------------------------------------------------------------------------

    def admit_in_order(self, waiting: Iterable[RequestView], headroom_blocks: int) -> None:
        """Admit waiting requests until one of them has to wait: nobody overtakes."""
        for request in waiting:
            if self.is_full:
                return
            if not self.is_coming(request) and not self.admit(request, headroom_blocks * self.num_running):
                return

    def is_coming(self, request: RequestView) -> bool:
        """Whether half or more of what a waiting request lacks is being computed for another one."""
        if not self.computing:
            return False
        hit = self.snapshot.prefix_hit(request.id).tokens
        half = request.num_tokens - (request.num_tokens - hit) // 2
        return any(self.snapshot.shares_prefix(request.id, other, half) for other in self.computing)

    def offer(self, request: RequestView) -> Offer:
        """What admitting a waiting request would take."""
        hit = self.snapshot.prefix_hit(request.id)
        blocks = self.snapshot.blocks_for(request.num_slots) - hit.blocks
        loads = worth_loading(self.snapshot, request, hit.tokens) if self.load else 0
        return Offer(request, hit.tokens, hit.blocks, hit.idle_blocks, blocks, loads)

    def admit(self, request: RequestView, headroom_blocks: int = 0) -> bool:
        """Grant the first tokens of a waiting request, or load them.

        False when the blocks for all of it are not there, or not so many more.
        """
        offer = self.offer(request)
        spare = self.available - self.promised - offer.idle_blocks
        # With nothing running there is nobody to leave headroom for: the head of the queue always gets in.
        if offer.blocks + (headroom_blocks if self.num_running else 0) > spare:
            return False
        self.take(offer)
        return True

    def take(self, offer: Offer) -> None:
        """Admit a request whose blocks are known to be there."""
        cached = offer.cached_tokens
        tokens = offer.loaded_tokens or min(offer.request.num_tokens - cached, self.budget)
        slots = cached + tokens + offer.request.slot_surplus
        first = self.snapshot.blocks_for(slots) - offer.cached_blocks
        self.promised += offer.blocks - first
        if offer.loaded_tokens:
            self._loads.append(offer.request.id)
            self.available -= first + offer.idle_blocks
        else:
            self._grant(offer.request.id, tokens, first + offer.idle_blocks)
        self.computing.append(offer.request.id)
        self.num_running += 1
        self.admitted += 1

    # ---- small parts -------------------------------------------------------------------------------------

    def _is_short_of(self, blocks: int) -> bool:
        """Whether so many are neither there nor coming. For what is coming a row waits, and nobody gives way: blocks
        that are copied first are not there at once, so else one who needs a block would empty the device."""
        return blocks > self.available and blocks > self.available + self.coming

    def _supplied(self, decoding: list[RequestView]) -> list[RequestView]:
        """Those whose next token has a place now: the first of those who need a block, and all who need none."""
        supplied, left = [], self.available
        for request in decoding:
            needs = request.num_slots > request.num_blocks * self.snapshot.block_size
            if needs <= left:
                supplied.append(request)
                left -= needs
        return supplied

    def _grant(self, id: str, tokens: int, blocks: int) -> None:
        self.grants.append(Grant(id, tokens))
        self.served.add(id)
        self.budget -= tokens
        self.available -= blocks

    def _next_giver(self) -> RequestView | StallView:
        if self._givers is None:
            self._givers = list(self.running if self._keepers is None else self._keepers())
        while self._givers:
            giver = self._givers.pop()
            if giver.id not in self.served and giver.id not in self.evicted and giver.id not in self.moved:
                return giver
        raise AssertionError("the request that needs blocks is itself unserved")


def _is_stall(giver: RequestView | StallView) -> TypeGuard[StallView]:
    return hasattr(giver, "call")
