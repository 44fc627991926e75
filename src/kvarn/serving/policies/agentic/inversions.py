"""Counts critical inversions of any policy: who should go first waits for blocks that who could wait holds.

An *inversion* is a request on its program's critical path that is taken off the device, or finds too few blocks to be
admitted, while minor requests hold at least the blocks it lacks. A *minor* request is on no critical path, came on the
device before, and belongs to the same program or to one that began later. Each stay in the queue counts once. The graph
and arrivals alone say who is minor, so the count is the same yardstick for every policy.

Source: TokenCake (arXiv 2510.18586), section 1, which counts inversions and does not define them; the note's C10.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.policies.protocol import Decision, Policy, RequestView, Snapshot

_LOOK_SECONDS = 0.25
_NOBODY = AgentHints()


@dataclass(slots=True)
class InversionCounters:
    """Totals."""

    preemptions: int = 0
    inversions: int = 0
    """Of preemptions and of admissions denied."""
    inverted_preemptions: int = 0
    """Those of them that are preemptions."""


class Metered:
    """A policy, and what it does to critical requests; of those that wait, the first `most` are looked at."""

    def __init__(self, policy: Policy, most: int = 10_000) -> None:
        self.policy = policy
        self._most = most
        self.counters = InversionCounters()
        self._denied: set[str] = set()
        self._look_at = float("-inf")

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        decision = self.policy.decide(snapshot, now)
        preempted = {*decision.preempt, *decision.offload}
        self.counters.preemptions += len(preempted)
        holders = [request for request in (*snapshot.running, *snapshot.loading) if request.id not in preempted]
        for request in snapshot.running:
            if request.id in preempted and _is_critical(request):
                inverted = self._minor_blocks(request, holders, snapshot) >= request.num_blocks > 0
                self.counters.inverted_preemptions += inverted
                self.counters.inversions += inverted
        if now >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            self._count_denials(snapshot, decision, holders)
        return decision

    def _count_denials(self, snapshot: Snapshot, decision: Decision, holders: list[RequestView]) -> None:
        let_in = {grant.id for grant in decision.grants} | {*decision.load}
        waiting = {request.id for request in snapshot.waiting if request.id not in let_in}
        self._denied &= waiting
        for request in snapshot.waiting[: self._most]:
            if request.id in let_in or request.id in self._denied or not _is_critical(request):
                continue
            hit = snapshot.prefix_hit(request.id)
            lacking = snapshot.blocks_for(request.num_slots) - hit.blocks + hit.idle_blocks
            lacking -= snapshot.available_blocks
            if lacking > 0 and self._minor_blocks(request, holders, snapshot) >= lacking:
                self._denied.add(request.id)
                self.counters.inversions += 1

    def _minor_blocks(self, request: RequestView, holders: list[RequestView], snapshot: Snapshot) -> int:
        began = _program_began(request, snapshot)
        return sum(
            other.num_blocks
            for other in holders
            if not _is_critical(other) and _program_began(other, snapshot) >= began
        )


def _is_critical(request: RequestView) -> bool:
    return (request.agent or _NOBODY).critical


def _program_began(request: RequestView, snapshot: Snapshot) -> float:
    program = None if snapshot.agents is None else snapshot.agents.program(request.id)
    return request.arrival if program is None else program.began
