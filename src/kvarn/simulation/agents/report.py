"""What a run of programs was like: records of programs, model calls and tool calls in, figures out.

End-to-end latency is from a program's arrival to the end of its last node. An agent's *turn* is a model call with the
tool calls in it and the calls that go on after them; it is *abnormal* when it takes more than 1.5 times as long as the
mean of its type (role), which the paper counts. All times in seconds on one clock.

Source: TokenCake (arXiv 2510.18586), section 6.1, for the metrics.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence, Sized
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

ABNORMAL = 1.5
"""Times the mean of its type that a turn takes at least to be abnormal."""


@dataclass(slots=True)
class CallRecord:
    """One model call."""

    program: str
    node: str
    agent: str
    turn: str
    """The first model call of the turn that it is part of."""
    ready: float
    """When all that it was after had ended, and it was asked."""
    first_token: float = 0.0
    """0 while there is none."""
    end: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    """Of the prompt, what the server had; None where it does not say."""
    output_tokens: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class ToolRecord:
    """One tool call."""

    program: str
    node: str
    kind: str
    caller: str
    start: float
    end: float
    predicted_seconds: float
    """By its client; negative where it said nothing."""


@dataclass(frozen=True, slots=True)
class ProgramRecord:
    """One program. `digest`: of the work it was (see `ProgramRun.digest`)."""

    id: str
    app: str
    arrival: float
    end: float
    digest: str
    error: str | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.arrival


@dataclass(frozen=True, slots=True)
class Turn:
    """One agent's turn."""

    agent: str
    seconds: float
    tool_seconds: float


class _Engine(Protocol):
    @property
    def waiting(self) -> Sized: ...
    def block_states(self) -> dict[str, int]: ...


@dataclass
class BlockSeries:
    """KV blocks by state, and how many requests wait, after steps that computed: parallel columns.

    At most one sample in `interval_seconds`: counting costs more than a simulated step.
    """

    interval_seconds: float = 0.1
    times: array[float] = field(default_factory=lambda: array("d"))
    states: dict[str, array[int]] = field(default_factory=dict)
    waiting: array[int] = field(default_factory=lambda: array("q"))

    def note(self, engine: _Engine, now: float) -> None:
        if self.times and now < self.times[-1] + self.interval_seconds:
            return
        for name, blocks in engine.block_states().items():
            if name not in self.states:
                self.states[name] = array("q", [0] * len(self.times))
            self.states[name].append(blocks)
        self.waiting.append(len(engine.waiting))
        self.times.append(now)

    def mean_blocks(self, *, contended: bool = False) -> dict[str, float]:
        """State -> blocks, averaged over time, or over the time in which somebody waits; a sample lasts until the
        next."""
        lasted = np.diff(np.array(self.times))
        if contended:
            lasted = lasted * (np.array(self.waiting[:-1]) > 0)
        if not lasted.sum() > 0:
            return dict.fromkeys(self.states, 0.0)
        return {
            name: float((np.array(blocks[:-1]) * lasted).sum() / lasted.sum()) for name, blocks in self.states.items()
        }

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """ "times", "waiting" and each state -> values, shape (samples,) each."""
        columns: dict[str, Any] = {"times": self.times, "waiting": self.waiting} | self.states
        return {name: np.array(values, dtype=np.float64) for name, values in columns.items()}


@dataclass(frozen=True)
class AgentRun:
    """What happened."""

    programs: list[ProgramRecord]
    """As they ended."""
    calls: list[CallRecord]
    """As they were asked."""
    tools: list[ToolRecord]
    blocks: BlockSeries = field(default_factory=BlockSeries)
    """Empty of a server that is not looked into."""
    refused: dict[str, int] = field(default_factory=dict)
    """Events that the server would not have: why -> how often."""

    @property
    def done(self) -> list[ProgramRecord]:
        return [record for record in self.programs if record.error is None]

    @property
    def latencies(self) -> NDArray[np.float64]:
        """Of the programs that got to their ends, in order of their names; shape (programs,)."""
        return np.array([record.seconds for record in sorted(self.done, key=lambda record: record.id)])

    @property
    def mean_seconds(self) -> float:
        return _mean(self.latencies)

    @property
    def makespan(self) -> float:
        """From the first arrival to the last end."""
        if not self.programs:
            return 0.0
        return max(record.end for record in self.programs) - min(record.arrival for record in self.programs)

    def work(self) -> dict[str, str]:
        """Program -> digest: equal for two runs that did the same work."""
        return {record.id: record.digest for record in self.programs}

    def turns(self) -> list[Turn]:
        """Of programs that got to their ends."""
        done = {record.id for record in self.done}
        calls: dict[tuple[str, str], list[CallRecord]] = defaultdict(list)
        turn_of = {}
        for call in self.calls:
            if call.program in done:
                calls[call.program, call.turn].append(call)
                turn_of[call.program, call.node] = (call.program, call.turn)
        waited: dict[tuple[str, str], float] = defaultdict(float)
        for tool in self.tools:
            if tool.program in done:
                waited[turn_of[tool.program, tool.caller]] += tool.end - tool.start
        return [Turn(each[0].agent, each[-1].end - each[0].ready, waited[turn]) for turn, each in calls.items()]

    def agent_seconds(self) -> dict[str, float]:
        """Type of agent -> mean seconds of its turns, tools included."""
        return {agent: _mean(seconds) for agent, seconds in _by_agent(self.turns(), tools=True).items()}

    def abnormal(self, *, tools: bool = True) -> dict[str, int]:
        """Type of agent -> turns that took more than ABNORMAL times its mean; with the time of tools, or without."""
        found = {}
        for agent, seconds in _by_agent(self.turns(), tools=tools).items():
            found[agent] = int(np.count_nonzero(np.array(seconds) > ABNORMAL * _mean(seconds)))
        return found

    def summary(self) -> dict[str, Any]:
        """Plain values for JSON. Seconds, tokens, blocks."""
        latencies, abnormal = self.latencies, self.abnormal()
        cached = [call.cached_tokens for call in self.calls if call.cached_tokens is not None]
        p50, p95 = (float(p) for p in np.percentile(latencies, (50, 95))) if len(latencies) else (0.0, 0.0)
        return {
            "programs": len(self.programs),
            "completed": len(self.done),
            "failures": dict(Counter(record.error for record in self.programs if record.error)),
            "mean_seconds": self.mean_seconds,
            "p50_seconds": p50,
            "p95_seconds": p95,
            "makespan": self.makespan,
            "model_calls": len(self.calls),
            "tool_calls": len(self.tools),
            "tool_seconds": sum(tool.end - tool.start for tool in self.tools),
            "prompt_tokens": sum(call.prompt_tokens for call in self.calls),
            "cached_tokens": sum(cached) if cached else None,
            "output_tokens": sum(call.output_tokens for call in self.calls),
            "preemptions": sum(call.preemptions for call in self.calls),
            "agent_seconds": self.agent_seconds(),
            "abnormal": abnormal,
            "abnormal_total": sum(abnormal.values()),
            "abnormal_without_tools": sum(self.abnormal(tools=False).values()),
            "mean_blocks": self.blocks.mean_blocks(),
            "mean_blocks_contended": self.blocks.mean_blocks(contended=True),
            "refused_events": self.refused,
        }

    def to_json(self) -> dict[str, Any]:
        """The summary and every record."""
        records = {name: [asdict(record) for record in getattr(self, name)] for name in ("programs", "calls", "tools")}
        return {"summary": self.summary(), **records}


def render(run: AgentRun, title: str = "") -> Group:
    """Two tables for people: programs, and types of agents."""
    summary = run.summary()
    table = Table.grid(padding=(0, 2))
    shown = f"{summary['mean_seconds']:,.2f} mean, {summary['p50_seconds']:,.2f} P50, {summary['p95_seconds']:,.2f} P95"
    cached = summary["cached_tokens"]
    share = "" if cached is None else f", {cached / max(1, summary['prompt_tokens']):.0%} of them cached"
    rows = [
        ("programs", f"{summary['completed']} of {summary['programs']} completed"),
        ("end to end s", shown),
        ("makespan s", f"{summary['makespan']:,.2f}"),
        ("model calls", f"{summary['model_calls']:,}, {summary['output_tokens']:,} output tokens"),
        ("prompt tokens", f"{summary['prompt_tokens']:,}{share}"),
        ("tool calls", f"{summary['tool_calls']:,}, {summary['tool_seconds']:,.1f} s"),
        ("abnormal turns", f"{summary['abnormal_total']} (of model time alone: {summary['abnormal_without_tools']})"),
        *((f"failed: {reason}", str(count)) for reason, count in summary["failures"].items()),
        *((f"refused: {reason}", str(count)) for reason, count in run.refused.items()),
    ]
    for name, text in rows:
        table.add_row(f" {name}", text)
    agents = Table("agent", "mean s", "abnormal")
    for column in agents.columns[1:]:
        column.justify = "right"
    for agent, seconds in summary["agent_seconds"].items():
        agents.add_row(agent, f"{seconds:,.2f}", str(summary["abnormal"][agent]))
    return Group(*([Text(title, style="italic")] if title else []), table, agents)


def _by_agent(turns: Sequence[Turn], *, tools: bool) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    for turn in turns:
        found[turn.agent].append(turn.seconds if tools else turn.seconds - turn.tool_seconds)
    return dict(sorted(found.items()))


def _mean(values: Sequence[float] | NDArray[np.float64]) -> float:
    return float(np.mean(values)) if len(values) else 0.0
