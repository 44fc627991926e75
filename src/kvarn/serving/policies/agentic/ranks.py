"""The ranks of all requests: made anew a few times a second, and for newcomers as they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.agents.lengths import OutputLengths
from kvarn.serving.agents.lifecycle import Call
from kvarn.serving.agents.priority import NO_HINTS, ORDERS, Claim, Key, ranked
from kvarn.serving.policies.agentic.settings import AgenticSettings
from kvarn.serving.policies.protocol import AgentView, RequestView, Snapshot

_TICKS = 4
"""Looks at stalled conversations for one at all ranks: these change slowly against one another."""


class Ranks:
    """Keys by request id, lower goes first; and what answers are expected to need."""

    def __init__(self, settings: AgenticSettings) -> None:
        self.lengths = OutputLengths()
        self._order = ORDERS[settings.order]
        self._tick = settings.tick
        self._keys: dict[str, Key] = {}
        self._running: dict[str, RequestView] = {}
        self._made_at = float("-inf")
        self.version = 0
        """Another one, other ranks."""

    def refresh(self, snapshot: Snapshot, agents: AgentView, now: float) -> None:
        """Bring ranks up to date: of all when it is time, else of newcomers."""
        self._learn(snapshot)
        requests: Iterable[RequestView] = (*snapshot.waiting, *snapshot.running, *snapshot.loading)
        if now < self._made_at + _TICKS * self._tick:
            requests = [request for request in requests if request.id not in self._keys]
            if not requests:
                return
            self.version += 1
            self._keys.update(self._rank(requests, snapshot, agents, now))
            return
        self._made_at = now
        self.version += 1
        self._keys = self._rank(list(requests), snapshot, agents, now)

    def __call__(self, request: RequestView) -> Key:
        """The rank of a request that has not ended."""
        return self._keys[request.id]

    def of_id(self, id: str) -> Key:
        """The rank of a request by its id; before everybody where there is none."""
        return self._keys.get(id, ())

    def of_call(self, call: Call, agents: AgentView, now: float) -> Key:
        """The rank that the request will have which goes on from a call."""
        program = agents.program(call.id)
        claim = Claim(now, call.started, call.num_tokens, 1.0, call.agent, program)
        return self._order(claim, now)

    def outputs_left(self, request: RequestView) -> int:
        """Tokens that its answer is expected to have still, at least one."""
        role = (request.agent or NO_HINTS).agent
        expected = self.lengths.expected(request.tenant, role, request.max_outputs)
        return max(1, expected - request.num_outputs)

    def _learn(self, snapshot: Snapshot) -> None:
        """Who has run and is nowhere any more has ended."""
        running = {request.id: request for request in snapshot.running}
        if self._running.keys() != running.keys():
            here = {request.id for request in (*snapshot.waiting, *snapshot.loading)}
            for id, request in self._running.items():
                if id not in running and id not in here:
                    self.lengths.learn(request.tenant, (request.agent or NO_HINTS).agent, request.num_outputs)
        self._running = running

    def _rank(
        self, requests: Sequence[RequestView], snapshot: Snapshot, agents: AgentView, now: float
    ) -> dict[str, Key]:
        means = _mean_importance(requests)
        prefill, decode = snapshot.costs.prefill_seconds(1), snapshot.costs.decode_seconds(1, 1024)
        claims = []
        for request in requests:
            hints: AgentHints = request.agent or NO_HINTS
            outputs = self.outputs_left(request)
            seconds = request.num_uncomputed * prefill + outputs * decode
            importance = hints.importance - means.get(request.tenant, 0.0)
            claims.append(
                Claim(
                    request.arrival, agents.began(request.id), request.num_tokens + outputs, seconds, hints,
                    agents.program(request.id), request.priority, importance,
                )
            )  # fmt: skip
        return ranked([request.id for request in requests], claims, self._order, now)


def _mean_importance(requests: Sequence[RequestView]) -> dict[str, float]:
    """By tenant: a tenant that calls all of its agents important says nothing."""
    sums: dict[str, tuple[int, int]] = {}
    for request in requests:
        total, count = sums.get(request.tenant, (0, 0))
        sums[request.tenant] = (total + (request.agent or NO_HINTS).importance, count + 1)
    return {tenant: total / count for tenant, (total, count) in sums.items()}
