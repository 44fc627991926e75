"""Agents as the engine has them: what is known of their tool calls (the desk) joined with what is held for them.

The engine tells of requests that come, run and end, and of clients' events; it gets back what to answer. A policy sees
all of it through `Snapshot.agents` and answers with moves of stalls.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvarn.serving.agents.desk import Desk
from kvarn.serving.agents.events import AgentEvent, CallReport
from kvarn.serving.agents.lifecycle import Call, CallState
from kvarn.serving.agents.moves import StallMove
from kvarn.serving.agents.programs import Program
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.kvcache.tiers import Tiers
from kvarn.serving.request import Request
from kvarn.serving.stalls import Stall, Stalls

_AWAY = frozenset({CallState.OFFLOADING, CallState.OFFLOADED, CallState.RESERVING, CallState.UPLOADING})


class AgentCalls:
    """Of one engine; None there for policies that know no agents. Also what a snapshot tells of them (AgentView)."""

    def __init__(self, cache: KVCache, tiers: Tiers | None, desk: Desk[Request] | None = None) -> None:
        self.desk: Desk[Request] = desk or Desk()
        self.held = Stalls(cache, tiers)
        self._tiers = tiers
        self._cache = cache

    # ---- the engine tells --------------------------------------------------------------------------------

    def added(self, request: Request, now: float) -> None:
        """A request has come."""
        found = "" if request.continues else self.held.prefix_of(request)
        self.desk.note_added(request, now, prefix_of=found)

    def taken_over(self, request: Request, now: float) -> None:
        """A request has blocks now, those of the conversation it goes on from among them."""
        call = self.desk.taken_over(request, now)
        if call is not None:
            self.held.end(call)

    def ended(self, request: Request, now: float, *, goes_on: bool) -> None:
        """A request has ended and still has its blocks; `goes_on`: a tool call may begin with its end."""
        self.desk.programs.note_service(request.id, request.prompt_length - request.cached_tokens, request.num_outputs)
        call = self.desk.note_ended(request, now, goes_on=goes_on)
        if call is not None:
            self.held.begin(call, request)

    def handle(self, event: AgentEvent, now: float) -> CallReport:
        """An event of a client. RequestError for what is unknown, contradicts or makes no sense."""
        report, begun, over = self.desk.handle(event, now)
        if begun is not None:
            self.held.begin(*begun)
        for call in over:
            self.held.end(call)
        stall = self.held.get(report.request)
        report.held_blocks = 0 if stall is None else stall.held_blocks
        return report

    def tend(self, now: float) -> None:
        """Let go of what is over by the clock, and note copies that have ended."""
        for call in self.desk.expire(now):
            self.held.end(call)
        self.held.note_copies(now)

    def apply(self, moves: Iterable[StallMove], now: float) -> None:
        for move in moves:
            self.held.apply(move, now)

    # ---- what a policy may know --------------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether there is neither a call nor a request of a program."""
        return not self.desk.calls and not self.desk.programs.num_live

    @property
    def is_away(self) -> bool:
        """Whether any conversation is to be brought back to the device, or on its way."""
        return any(stall.call.state in _AWAY for stall in self.held)

    @property
    def stalls(self) -> Sequence[Stall]:
        return list(self.held)

    def program(self, request_id: str) -> Program | None:
        return self.desk.programs.of(request_id)

    def began(self, request_id: str) -> float:
        """When the conversation of a request began."""
        return self.desk.programs.began(request_id)

    def call_of(self, request_id: str) -> Call | None:
        return self.desk.call_of(request_id)

    def reclaimable_blocks(self, id: str) -> int:
        """Blocks that letting go of a stall makes available."""
        stall = self.held.get(id)
        return 0 if stall is None else self.held.reclaimable(stall)

    def unmirrored_blocks(self, id: str) -> int:
        stall = self.held.get(id)
        return 0 if stall is None or self._tiers is None else self._tiers.unmirrored(stall.request)

    def loadable_blocks(self, id: str) -> int:
        stall = self.held.get(id)
        if stall is None or self._tiers is None:
            return 0
        cached = self._cache.lookup(stall.request).tokens
        return (self._tiers.loadable_tokens(stall.request) - cached) // self._cache.block_size
