"""What /metrics shows of agents. Labels are few and fixed: names that clients choose are in /v1/agents alone."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from kvarn.serving.agents.lifecycle import CallState
from kvarn.serving.api.messages import AgentStats

_EVENTS: Final = ("started", "finished", "expired", "continued")
_UPLOADS: Final = ("on_time", "late", "wasted")


class AgentMetrics:
    """From `AgentStats` since the engine's start; ours go on when another engine counts from zero."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.programs = Gauge("kvarn_agent_programs", "Programs that the engine remembers.", registry=registry)
        self.calls = Gauge(
            "kvarn_agent_calls", "Tool calls that go on, by where their KV is.", ["state"], registry=registry
        )
        self.held_blocks = Gauge("kvarn_agent_held_blocks", "Device blocks held for tool calls.", registry=registry)
        self.reserved_blocks = Gauge(
            "kvarn_agent_reserved_blocks", "Those of them that wait for content.", registry=registry
        )
        self.events = Counter(
            "kvarn_agent_call_events",
            "Tool calls that began, ended, were given up, and were gone on from.",
            ["event"],
            registry=registry,
        )
        self.offloads = Counter(
            "kvarn_agent_offloads", "Conversations taken off the device while their tools ran.", registry=registry
        )
        self.uploads = Counter(
            "kvarn_agent_uploads",
            "Conversations on the host, by whether they were back when the next request came.",
            ["outcome"],
            registry=registry,
        )
        self.forecasts = Counter("kvarn_agent_forecasts", "Calls that were forecast and are over.", registry=registry)
        self.forecast_error = Counter(
            "kvarn_agent_forecast_error_seconds", "How far off these forecasts were, added up.", registry=registry
        )
        self.inversions = Counter(
            "kvarn_agent_inversions",
            "Critical requests that waited, or left the device, while minor ones held the blocks they lacked.",
            registry=registry,
        )
        self._last = AgentStats()

    def note(self, stats: AgentStats) -> None:
        last, self._last = self._last, stats
        self.programs.set(stats.programs)
        for state in CallState:
            if state is not CallState.DEAD:
                self.calls.labels(state.value).set(stats.calls.get(state.value, 0))
        self.held_blocks.set(stats.held_blocks)
        self.reserved_blocks.set(stats.reserved_blocks)
        totals = [(self.events.labels(event), event) for event in _EVENTS]
        totals += [(self.uploads.labels(outcome), f"{outcome}_uploads") for outcome in _UPLOADS]
        totals += [(self.offloads, "offloads"), (self.forecasts, "forecasts"), (self.inversions, "inversions")]
        totals += [(self.forecast_error, "forecast_error_seconds")]
        for counter, field in totals:
            counter.inc(max(0, getattr(stats, field) - getattr(last, field)))

    def restart(self) -> None:
        """Another engine begins: nothing is held, and it counts from zero."""
        if self._last != AgentStats():
            self._last = AgentStats()
            for gauge in (self.programs, self.held_blocks, self.reserved_blocks):
                gauge.set(0)
            self.calls.clear()
