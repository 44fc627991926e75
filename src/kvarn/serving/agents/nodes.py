"""What a graph of an application is made of: nodes, edges, loop edges, and the ways through them.

`kvarn.serving.agents.graph` builds and plans it, `kvarn.serving.agents.unroll` takes its loops apart.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from kvarn.errors import KvarnError

DEFAULT_SECONDS = 1.0
"""Of a model call or a function of which nothing is known."""


@dataclass(frozen=True)
class Kind:
    """A kind of function node: how long one takes before any has been seen, and the stages it goes through."""

    seconds: float
    stages: tuple[str, ...] = ()


KINDS: Mapping[str, Kind] = {
    # The paper's table 1: file system and git 0.1 s, SQLite 0.1-1 s, web search 1-5 s, AI generation 5-30 s: of a
    # range, about the geometric middle. It has no people and no test runs: those two are guesses of ours.
    "file_read": Kind(0.1),
    "file_write": Kind(0.1),
    "search": Kind(2.0),
    "file_query": Kind(0.3),
    "data_analysis": Kind(12.0, ("query", "embed", "generate")),
    "user_confirm": Kind(15.0),
    "external_test": Kind(5.0),
}
"""The paper's seven kinds. Any other name is a kind too, of DEFAULT_SECONDS."""


class LlmNode(msgspec.Struct, tag_field="type", tag="llm", frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A model call; fields as in `Graph.llm`."""

    name: str
    agent: str = ""
    continues: str = ""
    seconds: float = DEFAULT_SECONDS
    importance: int = 0


class CallNode(
    msgspec.Struct, tag_field="type", tag="call", frozen=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A function call; fields as in `Graph.call`."""

    name: str
    kind: str = ""
    stages: tuple[str, ...] = ()
    predict_time: float | None = None

    @property
    def seconds(self) -> float:
        if self.predict_time is not None:
            return self.predict_time
        return KINDS[self.kind].seconds if self.kind in KINDS else DEFAULT_SECONDS


Node = LlmNode | CallNode


class Loop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A loop edge; fields as in `Graph.loop`."""

    last: str
    first: str
    rounds: int
    until: str = ""


@dataclass
class Drawn:
    """A graph as it was drawn; nothing is checked yet."""

    name: str
    nodes: dict[str, Node] = field(default_factory=dict)
    edges: dict[tuple[str, str], None] = field(default_factory=dict)
    """(before, after), in the order they were added."""
    loops: list[Loop] = field(default_factory=list)


@dataclass(frozen=True)
class Links:
    """The edges of an acyclic graph, both ways, and an order in which its nodes may run."""

    parents: Mapping[str, tuple[str, ...]]
    children: Mapping[str, tuple[str, ...]]
    order: tuple[str, ...]

    @classmethod
    def of(cls, graph: Drawn) -> Links:
        """KvarnError where an edge names no node, or where edges make a cycle."""
        parents: dict[str, list[str]] = {name: [] for name in graph.nodes}
        children: dict[str, list[str]] = {name: [] for name in graph.nodes}
        for before, after in graph.edges:
            for end in (before, after):
                check_name(graph, end, f"the edge from {before!r} to {after!r}")
            children[before].append(after)
            parents[after].append(before)
        place = {name: index for index, name in enumerate(graph.nodes)}
        missing = {name: len(before) for name, before in parents.items()}
        ready = [place[name] for name, count in missing.items() if count == 0]
        names, order = list(graph.nodes), []
        while ready:
            name = names[heapq.heappop(ready)]
            order.append(name)
            for child in children[name]:
                missing[child] -= 1
                if missing[child] == 0:
                    heapq.heappush(ready, place[child])
        if len(order) < len(names):
            raise _cycle_error(graph.name, parents, set(names) - set(order))
        return cls(_frozen(parents), _frozen(children), tuple(order))

    def ancestors(self, name: str) -> set[str]:
        return _reached(name, self.parents)

    def descendants(self, name: str) -> set[str]:
        return _reached(name, self.children)


def check_name(graph: Drawn, name: str, where: str) -> None:
    if name not in graph.nodes:
        raise KvarnError(
            f"Graph {graph.name!r} has no node {name!r}, which {where} names; it has {listed(graph.nodes)}."
        )


def _reached(name: str, links: Mapping[str, tuple[str, ...]]) -> set[str]:
    found: set[str] = set()
    waiting = list(links[name])
    while waiting:
        other = waiting.pop()
        if other not in found:
            found.add(other)
            waiting.extend(links[other])
    return found


def _cycle_error(graph: str, parents: Mapping[str, list[str]], left: set[str]) -> KvarnError:
    """Of the nodes `left`, each has a parent among them: walking up must come back to where it was."""
    walked = [min(left)]
    while walked[-1] not in walked[:-1]:
        walked.append(next(parent for parent in parents[walked[-1]] if parent in left))
    cycle = walked[walked.index(walked[-1]) :][::-1]
    return KvarnError(
        f"Graph {graph!r} has a cycle: {' -> '.join(cycle)}. Take an edge of it out, or make the one that sends work "
        f"back a loop edge: loop({cycle[-2]!r}, {cycle[-1]!r}, rounds=...)."
    )


def _frozen(links: Mapping[str, Collection[str]]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(others) for name, others in links.items()}


def listed(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") or "none"
