"""A program: one run of an application, with every number fixed, as it is played and as it is written to a file.

Its nodes are model calls and tool calls. Nothing of it depends on who serves it, so two servers (or policies) that
play the same programs do the same work. One JSON object a line in a file: a frozen trace.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from kvarn.errors import reason
from kvarn.serving.agents.hints import UNKNOWN, AgentHints
from kvarn.simulation.workloads import WorkloadError


@dataclass(frozen=True, slots=True)
class ModelNode:
    """One model call. Its prompt: see `kvarn.simulation.agents.progress`. Lengths in tokens."""

    name: str
    agent: str
    """Its role."""
    after: tuple[str, ...] = ()
    """Nodes that end before it begins; it reads what they said."""
    continues: str = ""
    """The model call whose conversation goes on in it; empty: a conversation of its own."""
    system_tokens: int = 0
    """The role's instructions, the same in all programs. This and the task only where it continues nothing."""
    task_tokens: int = 0
    """The program's task, the same for all its agents."""
    own_tokens: int = 0
    """What only this call is told."""
    output_tokens: int = 1
    hints: AgentHints = field(default_factory=AgentHints)


@dataclass(frozen=True, slots=True)
class ToolNode:
    """One tool call, made by the model call before it. Seconds and tokens."""

    name: str
    kind: str
    after: tuple[str, ...] = ()
    """The calling model call first."""
    seconds: float = 0.0
    predicted_seconds: float = UNKNOWN
    """What its client tells the server."""
    stages: tuple[str, ...] = ()
    result_tokens: int = 1

    @property
    def caller(self) -> str:
        return self.after[0]


Node = ModelNode | ToolNode


@dataclass(frozen=True)
class ProgramSpec:
    """One program to come."""

    id: str
    arrival: float
    """Seconds after the workload starts."""
    app: str
    nodes: tuple[Node, ...]
    """Each after those that it waits for."""
    seed: int = 0
    """Of what is said: programs of one workload share it, and with it the roles' instructions."""

    def __post_init__(self) -> None:
        known: dict[str, Node] = {}
        callers: set[str] = set()
        for node in self.nodes:
            if node.name in known:
                raise WorkloadError(f"program {self.id} has two nodes named {node.name!r}")
            for other in node.after:
                if other not in known:
                    raise WorkloadError(f"program {self.id}: {node.name!r} is after {other!r}, which is not before it")
            _check(self.id, node, known)
            if isinstance(node, ToolNode):
                if node.caller in callers:
                    raise WorkloadError(
                        f"program {self.id}: {node.caller!r} makes two tool calls; expected one at most"
                    )
                callers.add(node.caller)
            known[node.name] = node
        if not known:
            raise WorkloadError(f"program {self.id} has no nodes")

    @property
    def model_nodes(self) -> list[ModelNode]:
        return [node for node in self.nodes if isinstance(node, ModelNode)]

    @property
    def tool_nodes(self) -> list[ToolNode]:
        return [node for node in self.nodes if isinstance(node, ToolNode)]


def _check(program: str, node: Node, known: dict[str, Node]) -> None:
    where = f"program {program}, node {node.name!r}"
    if isinstance(node, ToolNode):
        if not node.after or not isinstance(known[node.after[0]], ModelNode):
            raise WorkloadError(f"{where}: a tool call comes after the model call that makes it")
        if not node.seconds >= 0 or node.result_tokens < 1:
            raise WorkloadError(f"{where}: {node.seconds} s and {node.result_tokens} tokens; expected 0 and 1 or more")
        return
    if node.continues and (node.continues not in known or not isinstance(known[node.continues], ModelNode)):
        raise WorkloadError(f"{where}: continues {node.continues!r}, which is no model call before it")
    own = node.system_tokens + node.task_tokens + node.own_tokens
    if node.output_tokens < 1 or (own < 1 and not node.continues):
        raise WorkloadError(f"{where}: a prompt of {own} tokens for {node.output_tokens}; expected 1 or more of each")


def write_programs(specs: Sequence[ProgramSpec], path: Path) -> None:
    """One line a program. WorkloadError where `path` cannot be written."""
    lines = []
    for spec in specs:
        row = asdict(spec)
        for node, fields in zip(spec.nodes, row["nodes"], strict=True):
            if isinstance(node, ModelNode):
                fields["hints"] = msgspec.to_builtins(node.hints)
        lines.append(json.dumps(row) + "\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise WorkloadError(f"cannot write {path}: {reason(error)}") from error


def read_programs(path: Path) -> list[ProgramSpec]:
    """What `write_programs` has written. WorkloadError with the line that cannot be read."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"cannot read {path}: {reason(error)}") from error
    specs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            specs.append(_program(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError, WorkloadError) as error:
            raise WorkloadError(f"{path} line {number} is no program: {error}") from error
    if not specs:
        raise WorkloadError(f"{path} holds no program")
    return specs


def _program(row: dict[str, Any]) -> ProgramSpec:
    return ProgramSpec(**row | {"nodes": tuple(_node(fields) for fields in row["nodes"])})


def _node(fields: dict[str, Any]) -> Node:
    fields = fields | {name: tuple(fields[name]) for name in ("after", "stages") if name in fields}
    if "kind" in fields:
        return ToolNode(**fields)
    return ModelNode(**fields | {"hints": msgspec.convert(fields.get("hints", {}), AgentHints)})
