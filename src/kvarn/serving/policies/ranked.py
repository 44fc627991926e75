"""Baselines that take turns: every tick, whoever ranks highest and fits has the device; the others make room.

    round robin    by turn: who has had his quantum goes to the end of the queue
    least slack    by how soon a reader runs dry
    QoE greedy     by how much waiting the next tick on the device spares a reader, for the blocks it takes

They use the same books, the same host tier and the same estimates as the streaming policy.
Source: Andes (arXiv 2404.16283) for the last one: knapsack by gain per length for each of several batch sizes, and a
refiner that lets nobody in whose gain is less than what the switch costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvarn.serving.policies.plan import Means, Plan, carry_out
from kvarn.serving.policies.protocol import Decision, RequestView, Snapshot


class Ranking(Protocol):
    def __call__(self, snapshot: Snapshot, now: float) -> Sequence[RequestView]:
        """Running and waiting requests, those that should have the device first; left out: those that should not."""
        ...


class Ranked:
    """A policy from a ranking.

    tick             seconds between two rankings at most; there also is one when somebody has come or gone
    prefill_budget   prompt tokens computed in a step that others' readers wait for; None: the whole token budget
    offload          whether KV goes to the host and back; else it is recomputed
    """

    def __init__(
        self, ranking: Ranking, *, tick: float = 0.5, prefill_budget: int | None = None, offload: bool = True
    ) -> None:
        self.ranking = ranking
        self.tick = tick
        self.prefill_budget = prefill_budget
        self.offload = offload
        self._plan = Plan()
        self._tick_at = float("-inf")
        self._crowd = (0, 0)

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        crowd = (len(snapshot.waiting) + len(snapshot.running), len(snapshot.loading))
        if now >= self._tick_at or crowd != self._crowd:
            self._plan = self._turns(snapshot, now) if snapshot.waiting else Plan()
            self._tick_at, self._crowd = now + self.tick, crowd
        decoding = sum([request.num_uncomputed <= 1 for request in snapshot.running])
        tokens = snapshot.token_budget - decoding
        if decoding and self.prefill_budget is not None:
            tokens = min(tokens, self.prefill_budget)
        means = Means(self.offload, self.tick, keepers=lambda: self._keepers(snapshot, now))
        step = carry_out(self._plan, snapshot, now, tokens, means)
        return step.decision(wake_at=float("inf") if step.grants else self._tick_at)

    def _turns(self, snapshot: Snapshot, now: float) -> Plan:
        """Who ranks highest and fits comes or stays."""
        room = snapshot.available_blocks + sum([request.num_blocks for request in snapshot.running])
        places = snapshot.max_running - len(snapshot.loading)
        running = {request.id for request in snapshot.running}
        ranked = self.ranking(snapshot, now)
        bring, staying = [], set()
        for request in ranked:
            # One more than it has tokens for, but not more than there are: else who fills the pool would never come.
            need = min(snapshot.blocks_for(request.num_slots) + 1, snapshot.num_blocks)
            if need > room or places <= 0:
                break
            room -= need
            places -= 1
            if request.id in running:
                staying.add(request.id)
            else:
                bring.append(request)
        order = [request for request in ranked if request.id in running]
        listed = {request.id for request in order}
        order += [request for request in snapshot.running if request.id not in listed]
        return Plan(bring, [request for request in order if request.id not in staying and request.num_uncomputed <= 1])

    def _keepers(self, snapshot: Snapshot, now: float) -> Sequence[RequestView]:
        running = {request.id for request in snapshot.running}
        ranked = [request for request in self.ranking(snapshot, now) if request.id in running]
        listed = {request.id for request in ranked}
        return ranked + [request for request in snapshot.running if request.id not in listed]


class RoundRobin:
    """Turns of `quantum` seconds in the order of arrival."""

    def __init__(self, quantum: float = 2.0) -> None:
        self.quantum = quantum

    def __call__(self, snapshot: Snapshot, now: float) -> Sequence[RequestView]:
        def turn(request: RequestView) -> tuple[bool, float]:
            joined = max(request.arrival, request.moved_at)
            return (True, joined)

        def kept(request: RequestView) -> tuple[bool, float]:
            over = request.moved_at + self.quantum
            return (over <= now, over)

        keyed = [(turn(request), request) for request in snapshot.waiting]
        keyed += [(kept(request), request) for request in snapshot.running]
        return [request for _, request in sorted(keyed, key=lambda pair: pair[0])]


def least_slack(snapshot: Snapshot, now: float) -> Sequence[RequestView]:
    """Who has the least before him; those who have nothing by arrival."""
    return sorted(
        [*snapshot.running, *snapshot.waiting],
        key=lambda request: (request.reader.slack(now), request.priority, request.arrival),
    )


class QoEGreedy:
    """Gain of a tick on the device: the share of his time so far that a reader is spared from waiting.

    horizon          seconds looked ahead
    switch_seconds   what a switch costs everybody; whoever gains less is not let in
    batch_sizes      how many sizes of the batch are tried
    """

    def __init__(self, horizon: float = 0.5, switch_seconds: float = 0.02, batch_sizes: int = 6) -> None:
        self.horizon = horizon
        self.switch_seconds = switch_seconds
        self.batch_sizes = batch_sizes

    def __call__(self, snapshot: Snapshot, now: float) -> Sequence[RequestView]:
        everybody = [*snapshot.running, *snapshot.waiting]
        if not everybody:
            return []
        running = {request.id for request in snapshot.running}
        context = sum([request.num_tokens for request in everybody]) / len(everybody)
        fitting = int(snapshot.num_blocks * snapshot.block_size / context)
        most = max(1, min(len(everybody), snapshot.max_running, fitting))
        best, best_gain = list[RequestView](), -1.0
        for k in range(1, self.batch_sizes + 1):
            size = max(1, most * k // self.batch_sizes)
            rate = 1.0 / snapshot.costs.decode_seconds(size, int(size * context))
            gains = [(self._gain(request, rate, request.id in running, now), request) for request in everybody]
            gains.sort(key=lambda pair: (-pair[0] / pair[1].num_tokens, pair[1].arrival))
            served = gains[:size]
            total = sum([gain for gain, _ in served])
            if total > best_gain:
                best_gain, best = total, [request for _, request in served]
        return best

    def _gain(self, request: RequestView, rate: float, resident: bool, now: float) -> float:
        reader = request.reader
        slack = reader.slack(now)
        horizon = self.horizon
        unserved = max(0.0, horizon - slack)
        behind = 1.0 - min(1.0, rate / reader.rate)
        late = 0.0 if resident else self.switch_seconds
        served = min(unserved, max(0.0, late + behind * horizon - slack))
        gain = (unserved - served) / (now - request.arrival + horizon)
        return gain if resident or unserved - served > self.switch_seconds else 0.0
