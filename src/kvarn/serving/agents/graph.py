"""An application as a graph of model calls and function calls, and what follows from it for each model call.

Built by the client: nodes and edges, with loop edges for work that may be sent back. `Graph.plan` checks it and gives a
`Plan`: depth, expected seconds, the critical path, what is waited for together, and the tool each model call waits for;
`Plan.hints` puts that into the hints of one request. Pure: nothing runs here.

A loop edge is no edge of the plan. `Graph.unrolled` repeats the loop's body instead, so that round 2 of `judge` is a
node `judge#2` (see `kvarn.serving.agents.unroll`).

Source: TokenCake (arXiv 2510.18586), section 2; remaining seconds are the upward rank of list scheduling (HEFT, 2002).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from kvarn.errors import KvarnError
from kvarn.serving.agents.hints import MOST_IMPORTANT, UNKNOWN, AgentHints
from kvarn.serving.agents.nodes import DEFAULT_SECONDS, KINDS, CallNode, Drawn, Kind, Links, LlmNode, Loop, Node, listed
from kvarn.serving.agents.unroll import unroll


class _Form(msgspec.Struct, forbid_unknown_fields=True):
    """A graph as JSON has it."""

    name: str
    nodes: list[Node]
    edges: list[tuple[str, str]] = []
    loops: list[Loop] = []


class Graph(Drawn):
    """A program: nodes, edges and loop edges. Names may be used before the node they name is there; `plan` checks."""

    def __init__(self, name: str) -> None:
        super().__init__(name)

    def llm(
        self,
        name: str,
        *,
        agent: str = "",
        after: Iterable[str] = (),
        continues: str = "",
        seconds: float = DEFAULT_SECONDS,
        importance: int = 0,
    ) -> str:
        """Add a model call by `agent` (default: the name), expected to take `seconds`; returns its name.

        `continues` names the model call whose conversation, and so whose KV, this one goes on with; it comes after it.
        In a loop it may name itself or a later node of the loop's body: then it means that node's round before.
        """
        self._check_time(name, "seconds", seconds)
        if not 0 <= importance <= MOST_IMPORTANT:
            raise KvarnError(f"Node {name!r} has importance {importance}; give it one from 0 to {MOST_IMPORTANT}.")
        return self._add(LlmNode(name, agent or name, continues, seconds, importance), after)

    def call(
        self,
        name: str,
        kind: str = "",
        *,
        after: Iterable[str] = (),
        stages: Iterable[str] = (),
        predict_time: float | None = None,
    ) -> str:
        """Add a function call of `kind` (one of KINDS or any name; default: the node's), which takes `predict_time`
        seconds; returns its name. Kinds with stages bring theirs where none are given."""
        if predict_time is not None:
            self._check_time(name, "predict_time", predict_time)
        kind = kind or name
        stages = tuple(stages) or KINDS.get(kind, Kind(DEFAULT_SECONDS)).stages
        if len(set(stages)) < len(stages):
            raise KvarnError(f"Node {name!r} has stages {list(stages)}; name each stage once.")
        return self._add(CallNode(name, kind, stages, predict_time), after)

    def add_edge(self, before: str, after: str) -> None:
        """`after` starts when `before` has ended."""
        self.edges[before, after] = None

    def loop(self, last: str, first: str, rounds: int, *, until: str = "") -> None:
        """`last` may send the work back to `first`; what lies between them runs at most `rounds` times in all.

        `until` names the node that ends the last round, where that is not `last`: a model that calls tools until it
        calls none is `loop("tools", "model", rounds, until="model")`.
        """
        if rounds < 1:
            raise KvarnError(f"The loop from {last!r} to {first!r} has rounds={rounds}; it needs at least 1.")
        if any((loop.last, loop.first) == (last, first) for loop in self.loops):
            raise KvarnError(f"There is a loop from {last!r} to {first!r} already; say its rounds once.")
        self.loops.append(Loop(last, first, rounds, until))

    def unrolled(self, rounds: Mapping[tuple[str, str], int] | None = None) -> Graph:
        """Acyclic copy. `rounds` says how often the loop (last, first) runs, where that is less often than it may."""
        graph = Graph(self.name)
        graph.nodes, graph.edges = unroll(self, rounds or {})
        return graph

    def plan(self) -> Plan:
        """What follows from the graph, where every loop runs as often as it may. KvarnError if it makes no sense."""
        return _plan(self.unrolled())

    def to_json(self) -> str:
        form = _Form(self.name, list(self.nodes.values()), list(self.edges), self.loops)
        return msgspec.json.encode(form).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Graph:
        """The graph that `to_json` wrote; KvarnError that names the field where something else did."""
        try:
            form = msgspec.json.decode(text, type=_Form)
        except msgspec.DecodeError as error:
            raise KvarnError(f"This is not a graph: {error}.") from error
        graph = cls(form.name)
        for node in form.nodes:
            fields: dict[str, Any] = msgspec.structs.asdict(node)
            (graph.llm if isinstance(node, LlmNode) else graph.call)(**fields)
        for before, after in form.edges:
            graph.add_edge(before, after)
        for loop in form.loops:
            graph.loop(loop.last, loop.first, loop.rounds, until=loop.until)
        return graph

    def _add(self, node: Node, after: Iterable[str]) -> str:
        if not node.name:
            raise KvarnError(f"A node of graph {self.name!r} has an empty name; name it.")
        if node.name in self.nodes:
            raise KvarnError(f"There are two nodes {node.name!r} in graph {self.name!r}; rename one.")
        self.nodes[node.name] = node
        for before in (after,) if isinstance(after, str) else after:
            self.add_edge(before, node.name)
        return node.name

    @staticmethod
    def _check_time(name: str, field: str, seconds: float) -> None:
        if not (math.isfinite(seconds) and seconds >= 0):
            raise KvarnError(f"Node {name!r} has {field}={seconds}; give it a number of seconds from 0 up.")


@dataclass(frozen=True)
class PlannedNode:
    """A node and its place in the whole. Times in seconds, as expected."""

    name: str
    agent: str
    """Of a model call."""
    kind: str
    """Of a function call."""
    is_call: bool
    """Whether it is a function call."""
    stages: tuple[str, ...]
    importance: int
    parents: tuple[str, ...]
    children: tuple[str, ...]
    continues: str
    depth: int
    """Nodes on the longest way from a first node to this one, itself included."""
    remaining_depth: int
    """Nodes after it on the longest way to a last node."""
    seconds: float
    """Its own."""
    said_seconds: float
    """The same where the graph's author said how long a function takes, else UNKNOWN."""
    remaining_seconds: float
    """From its start to the end of the program along the longest way: its rank."""
    critical: bool
    """Whether the program ends later if this node does."""
    join: str
    """Where its branch meets others: nodes with the same join are waited for together."""
    tool: str
    """Of a model call that another continues: the slowest function call between the two."""
    tool_seconds: float

    @property
    def fan_in(self) -> int:
        return len(self.parents)

    @property
    def fan_out(self) -> int:
        return len(self.children)


@dataclass(frozen=True)
class Plan:
    """A checked graph without loops."""

    name: str
    nodes: Mapping[str, PlannedNode]
    """In an order in which they may run."""
    total_seconds: float
    """Expected, where nothing has to wait for anything but its parents."""

    def hints(self, node: str, program: str) -> AgentHints:
        """Hints for the request that is model call `node` of run `program`.

        The tool's seconds are in them only where the graph's author gave them: a table's guess, repeated with every
        call, would outweigh what the server has seen.
        """
        planned = self.nodes.get(node)
        if planned is None:
            raise KvarnError(f"Graph {self.name!r} has no node {node!r}; it has {listed(self.nodes)}.")
        if planned.is_call:
            raise KvarnError(f"Node {node!r} is a function call; hints are of model calls.")
        tool = self.nodes.get(planned.tool)
        return AgentHints(
            program=program,
            agent=planned.agent,
            node=node,
            after=self._calls_before(planned),
            depth=planned.depth,
            fan_in=planned.fan_in,
            fan_out=planned.fan_out,
            remaining_seconds=planned.remaining_seconds,
            total_seconds=self.total_seconds,
            critical=planned.critical,
            join=planned.join,
            importance=planned.importance,
            tool=tool.kind if tool else "",
            tool_seconds=tool.said_seconds if tool else UNKNOWN,
        )

    def _calls_before(self, node: PlannedNode) -> tuple[str, ...]:
        """The model calls that one comes after, at once or with function calls between: a server sees no others."""
        seen: dict[str, None] = {}
        waiting = list(reversed(node.parents))
        while waiting:
            name = waiting.pop()
            if name not in seen and self.nodes[name].is_call:
                waiting.extend(reversed(self.nodes[name].parents))
            seen[name] = None
        return tuple(name for name in seen if not self.nodes[name].is_call)


def _plan(graph: Graph) -> Plan:
    """Of a graph without loops, whose continuations are edges or ways already."""
    if not graph.nodes:
        raise KvarnError(f"Graph {graph.name!r} has no node; add one with llm() or call().")
    links = Links.of(graph)
    continuing: dict[str, list[str]] = {}
    for name in links.order:
        node = graph.nodes[name]
        if isinstance(node, LlmNode) and node.continues:
            continuing.setdefault(node.continues, []).append(name)
        if len(graph.nodes) > 1 and not links.parents[name] and not links.children[name]:
            raise KvarnError(
                f"Nothing reaches node {name!r} of graph {graph.name!r}, and it reaches nothing: "
                "connect it (after=..., add_edge) or make it a graph of its own."
            )
    depth: dict[str, int] = {}
    start: dict[str, float] = {}
    for name in links.order:
        before = links.parents[name]
        depth[name] = 1 + max((depth[parent] for parent in before), default=0)
        start[name] = max((start[parent] + graph.nodes[parent].seconds for parent in before), default=0.0)
    height: dict[str, int] = {}
    rank: dict[str, float] = {}
    join: dict[str, str] = {}
    for name in reversed(links.order):
        next_nodes = links.children[name]
        height[name] = max((height[child] + 1 for child in next_nodes), default=0)
        rank[name] = graph.nodes[name].seconds + max((rank[child] for child in next_nodes), default=0.0)
        join[name] = _join(next_nodes, links, join)
    total = max(rank.values())
    nodes = {}
    for name in links.order:
        node = graph.nodes[name]
        is_call = isinstance(node, CallNode)
        tool = "" if is_call else _tool(graph, name, continuing.get(name, ()), links)
        nodes[name] = PlannedNode(
            name=name,
            agent="" if isinstance(node, CallNode) else node.agent,
            kind=node.kind if isinstance(node, CallNode) else "",
            is_call=is_call,
            stages=node.stages if isinstance(node, CallNode) else (),
            importance=0 if isinstance(node, CallNode) else node.importance,
            parents=links.parents[name],
            children=links.children[name],
            continues="" if isinstance(node, CallNode) else node.continues,
            depth=depth[name],
            remaining_depth=height[name],
            seconds=node.seconds,
            said_seconds=UNKNOWN if not isinstance(node, CallNode) or node.predict_time is None else node.predict_time,
            remaining_seconds=rank[name],
            critical=math.isclose(start[name] + rank[name], total, rel_tol=1e-9, abs_tol=1e-12),
            join=join[name],
            tool=tool,
            tool_seconds=graph.nodes[tool].seconds if tool else UNKNOWN,
        )
    return Plan(graph.name, nodes, total)


def _join(children: tuple[str, ...], links: Links, join: Mapping[str, str]) -> str:
    """Where a branch that has one way on meets others: at its child, or where the child's branch does."""
    if len(children) != 1:
        return ""
    [child] = children
    return child if len(links.parents[child]) > 1 else join[child]


def _tool(graph: Graph, name: str, continuing: Iterable[str], links: Links) -> str:
    """The slowest function call after model call `name` that one of those which continue it waits for."""
    waited_for = {before for other in continuing for before in links.ancestors(other)}
    calls = [child for child in links.children[name] if isinstance(graph.nodes[child], CallNode)]
    return max((call for call in calls if call in waited_for), key=lambda call: graph.nodes[call].seconds, default="")
