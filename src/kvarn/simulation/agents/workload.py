"""Workloads of programs: an application, a data set, arrivals and a law of durations in, `ProgramSpec`s out.

Everything is drawn here, once: how often loops go round, every length, every tool's seconds and what its client expects
of it. Streams of their own for each program and each purpose: other durations or other forecasts leave the lengths as
they were, and more programs leave the first ones as they were.

A program's hints come from its own graph with its loops unrolled, so a client knows at the start how often its loops
will go round. That is more than a real one knows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import msgspec
import numpy as np

from kvarn.serving.agents.graph import Plan, PlannedNode
from kvarn.serving.agents.hints import UNKNOWN
from kvarn.simulation.agents.apps import App, DataSet, find_app, find_data_set
from kvarn.simulation.agents.programs import ModelNode, Node, ProgramSpec, ToolNode
from kvarn.simulation.agents.tools import DurationLaw, LogNormalDuration
from kvarn.simulation.workloads import Arrivals, Lengths, Poisson, WorkloadError

_ROUNDS, _LENGTHS, _DURATIONS, _FORECASTS = range(4)


class Guess(StrEnum):
    """What a client's estimate of a tool's time starts from."""

    typical = "typical"
    """What is usual of the tool."""
    actual = "actual"
    """What it will really take: an oracle."""
    none = "none"
    """It says nothing."""


@dataclass(frozen=True)
class Forecasts:
    """How clients' estimates come about: the guess, times 1 + `bias`, off by up to a factor 1 + `error` either way."""

    guess: Guess = Guess.typical
    error: float = 0.0
    """0 to 2 and more: 0.2 is 20 %. Evenly by logarithm, so twice as long is as likely as half as long."""
    bias: float = 0.0
    """Above -1."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.error) and self.error >= 0):
            raise WorkloadError(f"error of forecasts is {self.error}; expected a number from 0 on, such as 0.2")
        if not (math.isfinite(self.bias) and self.bias > -1):
            raise WorkloadError(f"bias of forecasts is {self.bias}; expected a number above -1, such as -0.5")

    def seconds(self, typical: float, actual: float, rng: np.random.Generator) -> float:
        """One estimate; UNKNOWN where none is given."""
        off = math.exp(math.log1p(self.error) * float(rng.uniform(-1, 1)))
        if self.guess is Guess.none:
            return UNKNOWN
        return (typical if self.guess is Guess.typical else actual) * (1 + self.bias) * off


@dataclass(frozen=True)
class AgentWorkload:
    """What to draw."""

    app: str = "code-writer"
    data_set: str = "d1"
    programs: int = 24
    arrivals: Arrivals = field(default_factory=lambda: Poisson(0.2))
    """Of programs."""
    durations: DurationLaw = field(default_factory=LogNormalDuration)
    forecasts: Forecasts = Forecasts()
    token_scale: float = 1.0
    """All lengths are so many times as long: below 1 for small machines."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.programs < 1:
            raise WorkloadError(f"programs is {self.programs}; expected at least 1")
        if not (math.isfinite(self.token_scale) and self.token_scale > 0):
            raise WorkloadError(f"token_scale is {self.token_scale}; expected a number above 0")


def draw_programs(workload: AgentWorkload) -> list[ProgramSpec]:
    """The same workload, the same programs. Raises WorkloadError for names that nothing has."""
    app, data = find_app(workload.app), find_data_set(workload.data_set)
    times = workload.arrivals.times(workload.programs, np.random.default_rng([workload.seed, 0]))
    specs = [_program(workload, app, data, index, float(time)) for index, time in enumerate(times)]
    return with_forecasts(specs, workload.forecasts, workload.durations)


def with_forecasts(specs: Sequence[ProgramSpec], forecasts: Forecasts, typical: DurationLaw) -> list[ProgramSpec]:
    """The same programs, whose clients expect other durations."""
    changed = []
    for index, spec in enumerate(specs):
        rng = np.random.default_rng([spec.seed, 1, index, _FORECASTS])
        nodes = tuple(
            replace(node, predicted_seconds=forecasts.seconds(typical.typical(node.kind), node.seconds, rng))
            if isinstance(node, ToolNode)
            else node
            for node in spec.nodes
        )
        changed.append(replace(spec, nodes=_told(nodes)))
    return changed


def with_time_scale(specs: Sequence[ProgramSpec], factor: float) -> list[ProgramSpec]:
    """The same programs, whose arrivals, tools and expectations take `factor` times as long."""
    if not (math.isfinite(factor) and factor > 0):
        raise WorkloadError(f"time scale is {factor}; expected a number above 0")
    return [
        replace(spec, arrival=spec.arrival * factor, nodes=tuple(_slowed(node, factor) for node in spec.nodes))
        for spec in specs
    ]


def _slowed(node: Node, factor: float) -> Node:
    def slowed(seconds: float) -> float:
        return seconds if seconds == UNKNOWN else seconds * factor

    if isinstance(node, ToolNode):
        return replace(node, seconds=node.seconds * factor, predicted_seconds=slowed(node.predicted_seconds))
    hints = msgspec.structs.replace(
        node.hints,
        remaining_seconds=slowed(node.hints.remaining_seconds),
        total_seconds=slowed(node.hints.total_seconds),
        tool_seconds=slowed(node.hints.tool_seconds),
    )
    return replace(node, hints=hints)


def _program(workload: AgentWorkload, app: App, data: DataSet, index: int, arrival: float) -> ProgramSpec:
    def stream(purpose: int) -> np.random.Generator:
        return np.random.default_rng([workload.seed, 1, index, purpose])

    id = f"{app.name}-{index}"
    plan = app.instance(workload.durations.typical, data.mean_output, stream(_ROUNDS)).plan()
    draws = _Draws(workload, app, data, stream(_LENGTHS), stream(_DURATIONS))
    task = draws.tokens(data.task)
    nodes = [
        draws.tool(planned, plan.nodes) if planned.is_call else draws.model(planned, plan, id, task)
        for planned in plan.nodes.values()
    ]
    return ProgramSpec(id, round(arrival, 6), app.name, tuple(nodes), workload.seed)


def _told(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Model calls' hints say of the tools that follow them what the tools' clients expect."""
    tools = {node.caller: node for node in nodes if isinstance(node, ToolNode)}
    told: list[Node] = []
    for node in nodes:
        tool = tools.get(node.name)
        if isinstance(node, ModelNode) and tool is not None:
            hints = msgspec.structs.replace(node.hints, tool=tool.kind, tool_seconds=tool.predicted_seconds)
            node = replace(node, hints=hints)
        told.append(node)
    return tuple(told)


class _Draws:
    """Turns planned nodes into exact ones."""

    def __init__(
        self,
        workload: AgentWorkload,
        app: App,
        data: DataSet,
        lengths: np.random.Generator,
        durations: np.random.Generator,
    ) -> None:
        self._workload = workload
        self._app = app
        self._data = data
        self._lengths = lengths
        self._durations = durations

    def tokens(self, lengths: Lengths, weight: float = 1.0, rng: np.random.Generator | None = None) -> int:
        drawn = int(lengths.draw(1, rng or self._lengths)[0])
        return max(1, round(drawn * weight * self._workload.token_scale))

    def model(self, planned: PlannedNode, plan: Plan, program: str, task: int) -> ModelNode:
        app, data = self._app, self._data
        fresh = not planned.continues
        role = np.random.default_rng(list(hashlib.blake2b(f"{app.name} {planned.agent}".encode()).digest()[:8]))
        return ModelNode(
            name=planned.name,
            agent=planned.agent,
            after=planned.parents,
            continues=planned.continues,
            system_tokens=self.tokens(data.system, rng=role) if fresh else 0,
            task_tokens=task if fresh else 0,
            own_tokens=self.tokens(data.own),
            output_tokens=self.tokens(data.output, app.weight(planned.name)),
            hints=plan.hints(planned.name, program),
        )

    def tool(self, planned: PlannedNode, nodes: Mapping[str, PlannedNode]) -> ToolNode:
        callers = [parent for parent in planned.parents if not nodes[parent].is_call]
        others = [parent for parent in planned.parents if parent not in callers]
        return ToolNode(
            name=planned.name,
            kind=planned.kind,
            after=(*callers, *others),
            seconds=round(self._workload.durations.draw(planned.kind, self._durations), 6),
            stages=planned.stages,
            result_tokens=self.tokens(self._data.result),
        )
