"""What the engine has of agents: programs, their model calls and tool calls, and where their KV lies. Looks only.

Made between two steps: `agent_stats` a few times a second, so of sums alone; `report_agents` when somebody watches, of
the programs that were seen last.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator

from kvarn.serving.agent_calls import AgentCalls
from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.agents.lifecycle import Call, CallState
from kvarn.serving.agents.programs import Program
from kvarn.serving.api.messages import AgentsReport, AgentStats, EngineStats, NodeReport, ProgramReport
from kvarn.serving.engine import Engine
from kvarn.serving.kvcache.tiers import KVPlaces
from kvarn.serving.policies.agentic.inversions import Metered
from kvarn.serving.request import Request

_NO_HINTS = AgentHints()


def agent_stats(engine: Engine) -> AgentStats | None:
    """How agents and their calls stand; None where the policy knows none."""
    if engine.agents is None:
        return None
    desk, held = engine.agents.desk, engine.agents.held
    found = desk.counters.found
    return AgentStats(
        programs=len(desk.programs),
        calls=dict(Counter(call.state.value for call in desk.calls.values())),
        held_blocks=sum([stall.held_blocks for stall in held]),
        reserved_blocks=sum([stall.reserved_blocks for stall in held]),
        started=desk.counters.started,
        finished=desk.counters.finished,
        expired=desk.counters.expired,
        continued=desk.counters.continued,
        offloads=held.counters.offloads,
        on_time_uploads=found[CallState.READY],
        late_uploads=sum(found[state] for state in (CallState.OFFLOADED, CallState.RESERVING, CallState.UPLOADING)),
        wasted_uploads=held.counters.wasted_uploads,
        forecasts=desk.forecaster.count,
        forecast_error_seconds=desk.forecaster.error_seconds,
        inversions=engine.policy.counters.inversions if isinstance(engine.policy, Metered) else 0,
    )


def report_agents(engine: Engine, stats: EngineStats, limit: int) -> AgentsReport:
    """The `limit` programs of an engine that were seen last, those with something going on first."""
    agents, now = engine.agents, engine.clock.now()
    if agents is None:
        return AgentsReport(stats, {}, [])
    programs = agents.desk.programs
    calls: dict[int, list[Call]] = defaultdict(list)
    for call in agents.desk.calls.values():
        if (program := programs.of(call.id)) is not None:
            calls[id(program)].append(call)
    shown = heapq.nlargest(
        limit, programs, key=lambda each: (bool(each.live) or id(each) in calls, each.last_seen, each.id)
    )
    requests = {each.id: each for each in (*engine.waiting, *engine.loading, *engine.running)}
    watch = _Watch(engine, agents, requests, now)
    return AgentsReport(stats, engine.block_states(), [watch.program(each, calls[id(each)]) for each in shown])


class _Watch:
    """One look at the engine."""

    def __init__(self, engine: Engine, agents: AgentCalls, requests: dict[str, Request], now: float) -> None:
        self._engine = engine
        self._agents = agents
        self._requests = requests
        self._now = now

    def program(self, program: Program, calls: list[Call]) -> ProgramReport:
        return ProgramReport(
            id=program.id,
            age=self._now - program.began,
            idle=self._now - program.last_seen,
            work_tokens=program.service,
            remaining_seconds=program.remaining_seconds,
            total_seconds=program.total_seconds,
            nodes=list(self._nodes(program, {call.id: call for call in calls})),
        )

    def _nodes(self, program: Program, calls: dict[str, Call]) -> Iterator[NodeReport]:
        """Nodes as clients name them; then what goes on without a name."""
        named = set()
        for name, node in program.nodes.items():
            named.add(node.request)
            report = self._node(name, node.request, node.hints, calls.get(node.request))
            report.age = self._now - node.since
            yield report
        for request in sorted(program.live | calls.keys()):
            if request not in named:
                yield self._node(request, request, _NO_HINTS, calls.get(request))

    def _node(self, name: str, id: str, hints: AgentHints, call: Call | None) -> NodeReport:
        request, stall = self._requests.get(id), self._agents.held.get(id)
        report = NodeReport(name=name, request=id, hints=hints, state="ended")
        if request is not None:
            report.state = request.state.value
        elif call is not None:
            report.state = "answered" if call.finished else "retained" if call.retained else "calling"
            report.tool = call.tool
            report.call = self._agents.desk.report(call, self._now)
            report.call.held_blocks = 0 if stall is None else stall.held_blocks
        if stall is not None:
            report.reserved_blocks = stall.reserved_blocks
            request = stall.request
        if request is not None:
            report.tokens, report.age = request.num_tokens, self._now - request.arrival
            cache, tiers = self._engine.cache, self._engine.tiers
            places = KVPlaces(cache.device_blocks(request)) if tiers is None else tiers.places(request)
            report.blocks = cache.blocks_for(request.num_tokens)
            report.device_blocks, report.host_blocks, report.disk_blocks = places.device, places.host, places.disk
        return report
