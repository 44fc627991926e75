"""The agentic policy: programs in the order that ends them soonest, idle KV out of the way, critical roles first.

Every decision reads one snapshot, so that none of its parts works against another: who runs goes on; conversations
whose tools run are kept, copied out or brought back (`idle`, `kvarn.serving.agents.offload` and `upload`); who waits is
admitted in the order of ranks (`ranks`, `kvarn.serving.agents.priority`), as far as blocks allow, with those of
critical roles set aside (`kvarn.serving.agents.reservations`). An idle conversation gives its blocks up only where that
lets somebody in at once. A head that does not fit is not overtaken: so it gets the blocks that come free.

With people who read: an agent never has anything left to read, so nothing of what it waits for can wait; a reader can,
for as long as he has text before him. So readers with enough slack make room for agents, come back before they run
dry, and are otherwise ranked as programs of one request. Without any agent the streaming policy decides alone.

Source: TokenCake (arXiv 2510.18586), sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.agents.lifecycle import CallState
from kvarn.serving.agents.moves import Verb
from kvarn.serving.agents.reservations import Reservations, ReservationSettings
from kvarn.serving.policies.agentic.idle import Idle
from kvarn.serving.policies.agentic.ranks import Ranks
from kvarn.serving.policies.agentic.settings import AgenticSettings
from kvarn.serving.policies.protocol import AgentView, Decision, RequestView, Snapshot, StallView
from kvarn.serving.policies.step import Offer, Step
from kvarn.serving.policies.streaming.policy import Streaming
from kvarn.serving.policies.streaming.settings import StreamingSettings

_IN_VAIN = 8
"""Requests that a step asks about without being able to admit them, at most."""
_COUNTED = 64
"""Waiting requests whose blocks count as wanted."""


class _Blocked(NamedTuple):
    """Who found too few blocks, how many it needs, and until when it need not be asked again."""

    head: RequestView | None = None
    need: int = 0
    situation: tuple[int, int, int] = (0, 0, 0)
    """Requests that wait, stalled conversations, and the ranks' version."""
    until: float = float("-inf")


class Agentic:
    """See the module; one for each engine."""

    def __init__(self, settings: AgenticSettings = AgenticSettings()) -> None:
        self.settings = settings
        self.streaming = Streaming(StreamingSettings(prefill_budget=settings.prefill_budget))
        self.ranks = Ranks(settings)
        self.idle = Idle(settings)
        self.reservations: Reservations | None = None
        self._roles: tuple[float, dict[str, int], dict[str, int]] = (float("-inf"), {}, {})
        """When blocks were last counted by role; those used, and those waited for."""
        self._blocked = _Blocked()

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        agents = snapshot.agents
        if agents is None or (self.settings.readers and agents.is_empty):
            return self.streaming.decide(snapshot, now)
        self.ranks.refresh(snapshot, agents, now)
        running = sorted(snapshot.running, key=self.ranks)
        step = Step(
            snapshot, running, givers=lambda: self._givers(step, agents, running, now), offload=self.settings.offload
        )
        self.idle.tend(step, agents, self.ranks, now)
        prefilling = step.continue_decoding()
        step.computing = [request.id for request in (*prefilling, *snapshot.loading)]
        if step.grants and self.settings.prefill_budget is not None:
            step.budget = min(step.budget, self.settings.prefill_budget)
        for request in prefilling:
            step.continue_running(request)
        head = None if step.evicted else self._admit(step, agents, running, now)
        growth = sum([self._growth(snapshot, request) for request in snapshot.running]) if agents.is_away else 0
        self.idle.bring_back(step, agents, self.ranks, head, growth, now)
        return step.decision()

    # ---- admission ---------------------------------------------------------------------------------------

    def _admit(self, step: Step, agents: AgentView, running: Sequence[RequestView], now: float) -> RequestView | None:
        """Admit in the order of ranks; the first who found no blocks, if there is one."""
        snapshot = step.snapshot
        if not snapshot.waiting:
            return None
        if self._is_blocked(step, now):
            return self._blocked.head
        queue = self._queue(snapshot, now)
        growth = sum([self._growth(snapshot, request) for request in snapshot.running])
        roles = self._plan_reserves(snapshot, queue, now)
        in_vain = 0
        for request in queue:
            if step.is_full or in_vain == _IN_VAIN:
                break
            call = agents.call_of(request.id)
            if (call is not None and call.state is CallState.UPLOADING) or step.is_coming(request):
                in_vain += 1
                continue  # what it needs is on its way
            offer = step.offer(request)
            need = offer.blocks + offer.idle_blocks + growth + self._growth(snapshot, request)
            need += self._withheld(request, roles)
            if not self._make_room(step, agents, request, need, running, now):
                alone = step.num_running == 0 and self._clear(step, agents, offer)
                if not alone:
                    situation = (len(snapshot.waiting), len(agents.stalls), self.ranks.version)
                    self._blocked = _Blocked(request, need, situation, now + self.settings.tick)
                    return request
            growth += self._growth(snapshot, request)
            if self.reservations is not None and roles is not None:
                roles[0][_role(request)] = roles[0].get(_role(request), 0) + offer.blocks
            step.take(offer)
        return None

    def _is_blocked(self, step: Step, now: float) -> bool:
        """Whether who found no blocks a moment ago would find none now: nobody came, and too few have come free."""
        snapshot, blocked = step.snapshot, self._blocked
        assert snapshot.agents is not None
        situation = (len(snapshot.waiting), len(snapshot.agents.stalls), self.ranks.version)
        spare = step.available - step.promised
        return situation == blocked.situation and now < blocked.until and spare < blocked.need and step.num_running > 0

    def _queue(self, snapshot: Snapshot, now: float) -> list[RequestView]:
        """Who waits, in the order of ranks; readers who were set aside come when they have little left to read."""
        if not self.settings.readers:
            return sorted(snapshot.waiting, key=self.ranks)
        due, later, others = list[RequestView](), list[RequestView](), list[RequestView]()
        for request in snapshot.waiting:
            if request.preemptions and request.reader.started and self._is_read(snapshot, request):
                (due if request.reader.slack(now) < self.settings.slack / 2 else later).append(request)
            else:
                others.append(request)
        due.sort(key=lambda request: request.reader.slack(now))
        return [*due, *sorted(others, key=self.ranks), *sorted(later, key=lambda request: request.reader.slack(now))]

    def _make_room(
        self, step: Step, agents: AgentView, request: RequestView, need: int, running: Sequence[RequestView], now: float
    ) -> bool:
        """Whether so many blocks are there; idle conversations and then others give way if that lets the request in."""
        spare = step.available - step.promised
        if need <= spare:
            return True
        if need <= spare + step.coming:
            return False  # they are on their way
        call = agents.call_of(request.id)
        own = "" if call is None else call.id
        stalls = [stall for stall in self.idle.givers(step, agents, now, request, self.ranks) if stall.id != own]
        victims = self._victims(step, request, running, now)
        could = sum(step.snapshot.reclaimable_blocks(stall.id) for stall in stalls)
        could += sum(step.snapshot.reclaimable_blocks(victim.id) for victim in victims)
        if need > spare + step.coming + could:
            return False
        verb: Verb = "offload" if step.offload else "release"
        for stall in stalls:
            if need <= step.available - step.promised + step.coming:
                break
            step.let_go(stall, verb)
        for victim in victims:
            if need <= step.available - step.promised + step.coming:
                break
            step.withdraw(victim)
            step.evict(victim)
        return need <= step.available - step.promised

    def _clear(self, step: Step, agents: AgentView, offer: Offer) -> bool:
        """Nothing runs: whatever is held gives way to the first who waits, else nobody ever would."""
        need = offer.blocks + offer.idle_blocks
        for stall in self.idle.everybody(step, agents):
            if need <= step.available - step.promised:
                break
            step.let_go(stall, "release")
        return need <= step.available - step.promised

    def _victims(
        self, step: Step, request: RequestView, running: Sequence[RequestView], now: float
    ) -> list[RequestView]:
        """Running requests that make room for this one, the first to go in front: readers who have enough before them,
        and for a critical agent those of other programs that go behind it."""
        snapshot, settings = step.snapshot, self.settings
        found = []
        settled = [
            other
            for other in running
            if other.num_uncomputed <= 1 and other.moved_at <= now - settings.residence and other.id not in step.evicted
        ]
        if settings.readers and snapshot.tiers is not None:
            reading = [other for other in settled if self._is_read(snapshot, other)]
            found = [other for other in reading if other.reader.slack(now) >= settings.slack]
            found.sort(key=lambda other: -other.reader.slack(now))
        if settings.preempt and snapshot.tiers is not None and (request.agent or _NOBODY).critical:
            mine = self.ranks(request)
            behind = [other for other in settled if self.ranks(other) > mine and not (other.agent or _NOBODY).critical]
            found += [other for other in reversed(behind) if other not in found]
        return found

    def _is_read(self, snapshot: Snapshot, request: RequestView) -> bool:
        """Whether a person reads it: no agent's request."""
        assert snapshot.agents is not None
        return snapshot.agents.program(request.id) is None

    def _growth(self, snapshot: Snapshot, request: RequestView) -> int:
        """Blocks that a request is to find free as its answer grows."""
        if self.settings.growth == 0.0:
            return 1
        return 1 + int(self.settings.growth * self.ranks.outputs_left(request)) // snapshot.block_size

    # ---- who keeps blocks --------------------------------------------------------------------------------

    def _givers(
        self, step: Step, agents: AgentView, running: Sequence[RequestView], now: float
    ) -> Sequence[RequestView | StallView]:
        """All that hold blocks, the first to keep them in front: running requests by rank, then idle conversations."""
        stalls = self.idle.givers(step, agents, now)
        rest = [stall for stall in self.idle.everybody(step, agents) if stall not in stalls]
        idle = [stall for stall in (*stalls, *rest) if stall.call.state is not CallState.UPLOADING]
        return [*running, *reversed(idle)]

    # ---- reserves ----------------------------------------------------------------------------------------

    def _plan_reserves(
        self, snapshot: Snapshot, queue: Sequence[RequestView], now: float
    ) -> tuple[dict[str, int], dict[str, int]] | None:
        """Blocks that each role uses, and that its requests wait for; None without reserves."""
        if self.settings.reserve == "off":
            return None
        if self.reservations is None:
            settings = ReservationSettings(
                critical=self.settings.critical, published=self.settings.reserve == "published"
            )
            self.reservations = Reservations(settings, snapshot.num_blocks)
        counted_at, used, waiting = self._roles
        if now < counted_at + self.settings.tick:
            return used, waiting
        used, waiting = {}, {}
        self._roles = (now, used, waiting)
        scores: dict[str, list[float]] = {}
        for request in (*snapshot.running, *snapshot.loading):
            used[_role(request)] = used.get(_role(request), 0) + request.num_blocks
            scores.setdefault(_role(request), []).append(-self.ranks(request)[0])
        for request in queue[:_COUNTED]:
            waiting[_role(request)] = waiting.get(_role(request), 0) + snapshot.blocks_for(request.num_slots)
            scores.setdefault(_role(request), []).append(-self.ranks(request)[0])
        means = {role: sum(values) / len(values) for role, values in scores.items()}
        self.reservations.update(now, used, means)
        return used, waiting

    def _withheld(self, request: RequestView, roles: tuple[dict[str, int], dict[str, int]] | None) -> int:
        """Blocks that a request must leave to critical roles with requests waiting."""
        if roles is None or self.reservations is None:
            return 0
        return self.reservations.withheld(_role(request), *roles)


_NOBODY = AgentHints()


def _role(request: RequestView) -> str:
    return (request.agent or _NOBODY).agent
