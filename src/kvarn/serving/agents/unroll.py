"""Unrolls the loops of a graph: a graph without loop edges, in which each loop's body stands once for every round.

Theory. A loop edge from `last` to `first` has as its body every node on a way from `first` to `last`. With n rounds the
body is there n times; `last` of a round comes before `first` of the next. What came into the body comes into its first
round; what hung on the body hangs on its last round. Inner loops go first, so that an outer body holds their rounds.
Copies of `judge` are `judge#2`, `judge#3`, ... in the order in which they run.

A model call that continues one of its own round does so in every round. One that continues itself, or a node later in
the body, means the round before; in the first round there is none, and it begins a conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from kvarn.errors import KvarnError
from kvarn.serving.agents.nodes import Drawn, Links, LlmNode, Loop, Node, check_name


@dataclass
class _Turning:
    """A loop on its way through the unrolling of others, whose copies move its ends."""

    loop: Loop
    rounds: int
    last: str
    until: str

    @property
    def first(self) -> str:
        return self.loop.first


def unroll(graph: Drawn, rounds: Mapping[tuple[str, str], int]) -> tuple[dict[str, Node], dict[tuple[str, str], None]]:
    """Nodes and edges of the graph with every loop run as often as `rounds` says, or else as often as it may."""
    turning = [
        _Turning(loop, _rounds(loop, rounds), loop.last, loop.until or loop.last)
        for loop in _checked_loops(graph, rounds)
    ]
    flat = _continued(graph)
    links = Links.of(flat)
    bodies = {id(turn): _body(turn, links) for turn in turning}
    _check_continuations(flat, links, list(bodies.values()))
    origin = {name: name for name in flat.nodes}
    for turn in sorted(turning, key=lambda turn: len(bodies[id(turn)])):
        flat = _unroll_one(flat, turn, [other for other in turning if other is not turn], origin)
    links = Links.of(flat)
    for name, node in flat.nodes.items():
        if isinstance(node, LlmNode) and node.continues and node.continues not in links.ancestors(name):
            flat.nodes[name] = msgspec.structs.replace(node, continues="")
    return flat.nodes, flat.edges


def _checked_loops(graph: Drawn, rounds: Mapping[tuple[str, str], int]) -> list[Loop]:
    known = {(loop.last, loop.first) for loop in graph.loops}
    for last, first in rounds:
        if (last, first) not in known:
            raise KvarnError(f"Graph {graph.name!r} has no loop from {last!r} to {first!r}; rounds names one.")
    for loop in graph.loops:
        for name in (loop.last, loop.first, loop.until or loop.last):
            check_name(graph, name, f"the loop from {loop.last!r} to {loop.first!r}")
    return graph.loops


def _rounds(loop: Loop, rounds: Mapping[tuple[str, str], int]) -> int:
    asked = rounds.get((loop.last, loop.first), loop.rounds)
    if not 1 <= asked <= loop.rounds:
        raise KvarnError(
            f"{asked} rounds of the loop from {loop.last!r} to {loop.first!r}; it has from 1 to {loop.rounds}."
        )
    return asked


def _continued(graph: Drawn) -> Drawn:
    """A copy without loops, in which a node has an edge from the one it continues, unless a way leads there already."""
    flat = Drawn(graph.name, dict(graph.nodes), dict(graph.edges))
    links = Links.of(flat)
    for name, node in graph.nodes.items():
        if not isinstance(node, LlmNode) or not node.continues:
            continue
        check_name(graph, node.continues, f"continues of {name!r}")
        if not isinstance(graph.nodes[node.continues], LlmNode):
            raise KvarnError(
                f"Node {name!r} continues {node.continues!r}, which is a function call and has no conversation: "
                "name the model call before it."
            )
        if node.continues != name and node.continues not in links.ancestors(name) | links.descendants(name):
            flat.edges[node.continues, name] = None
            links = Links.of(flat)
    return flat


def _body(turn: _Turning, links: Links) -> list[str]:
    """Nodes on a way from the loop's first to its last, in an order in which they may run."""
    inside = ({turn.first} | links.descendants(turn.first)) & ({turn.last} | links.ancestors(turn.last))
    loop = turn.loop
    if turn.first not in inside:
        raise KvarnError(
            f"The loop from {loop.last!r} to {loop.first!r} goes back to a node that it does not come after: "
            "connect them, or turn it round."
        )
    if turn.until not in inside:
        raise KvarnError(
            f"The loop from {loop.last!r} to {loop.first!r} has until={loop.until!r}, which is not between the two."
        )
    return [name for name in links.order if name in inside]


def _check_continuations(flat: Drawn, links: Links, bodies: list[list[str]]) -> None:
    for name, node in flat.nodes.items():
        if not isinstance(node, LlmNode) or not node.continues or node.continues in links.ancestors(name):
            continue
        if not any(name in body and node.continues in body for body in bodies):
            raise KvarnError(
                f"Node {name!r} continues {node.continues!r}, which does not end before it: "
                "continue an earlier model call, or make both part of a loop."
            )


def _unroll_one(flat: Drawn, turn: _Turning, others: list[_Turning], origin: dict[str, str]) -> Drawn:
    links = Links.of(flat)
    body = _body(turn, links)
    to_the_end = links.ancestors(turn.until) | {turn.until}
    final = [name for name in body if name in to_the_end]
    copies = [{name: name for name in (body if turn.rounds > 1 else final)}]
    for round_number in range(2, turn.rounds + 1):
        members = body if round_number < turn.rounds else final
        copies.append({name: _fresh_name(origin, name) for name in members})
    # Where the last round stops short of a node, what hung on it hangs on the round before or on the round's end.
    latest = dict.fromkeys(body, copies[-1][turn.until])
    conversations = dict.fromkeys(body, "")
    for names in copies:
        latest.update(names)
        conversations.update(names)

    result = Drawn(flat.name)
    for name, node in flat.nodes.items():
        if name not in latest:
            result.nodes[name] = _continuing(node, conversations)
        elif name in copies[0]:
            result.nodes[name] = _continuing(node, conversations if _means_last_round(node, links) else {})
    for earlier, names in pairwise(copies):
        for name, copy in names.items():
            node = flat.nodes[name]
            same_round = _continuing(node, earlier if _means_last_round(node, links) else names)
            result.nodes[copy] = msgspec.structs.replace(same_round, name=copy)
    for before, after in flat.edges:
        if before in latest and after in latest:
            for names in copies:
                if before in names and after in names:
                    result.edges[names[before], names[after]] = None
        elif after not in latest or after in copies[0]:
            result.edges[latest.get(before, before), after] = None
    for earlier, names in pairwise(copies):
        result.edges[earlier[turn.last], names[turn.first]] = None
    for other in others:
        other.last, other.until = latest.get(other.last, other.last), latest.get(other.until, other.until)
    return result


def _means_last_round(node: Node, links: Links) -> bool:
    return isinstance(node, LlmNode) and node.continues not in links.ancestors(node.name)


def _continuing(node: Node, names: Mapping[str, str]) -> Node:
    """The node, going on with the copy of what it continued."""
    if isinstance(node, LlmNode) and node.continues in names:
        return msgspec.structs.replace(node, continues=names[node.continues])
    return node


def _fresh_name(origin: dict[str, str], name: str) -> str:
    base = origin[name]
    copy = next(f"{base}#{n}" for n in range(2, len(origin) + 3) if f"{base}#{n}" not in origin)
    origin[copy] = base
    return copy
