"""LangGraph: a compiled graph as a `Graph`, and callbacks that tell the server when tools start and end.

What a compiled graph says: its nodes, and edges of which some are conditional. What it does not say: which nodes call a
model, how long they take, how often a loop turns. Nodes made of a ToolNode are function calls; the rest is for the
caller to say. A branch that may or may not be taken counts as taken: times are those of the longest case.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.outputs import LLMResult
from langgraph.prebuilt import ToolNode

from kvarn.clients.calls import OpenCalls
from kvarn.clients.events import AgentEvents
from kvarn.errors import KvarnError
from kvarn.serving.agents.events import Close
from kvarn.serving.agents.graph import Graph

DEFAULT_ROUNDS = 3
"""Of a loop, where the caller does not say."""
_ENDS = ("__start__", "__end__")


def from_langgraph(
    compiled: Any,
    *,
    name: str = "",
    calls: Mapping[str, str] | None = None,
    seconds: Mapping[str, float] | None = None,
    rounds: int | Mapping[tuple[str, str], int] = DEFAULT_ROUNDS,
    subgraphs: bool = True,
) -> Graph:
    """The graph of a compiled LangGraph graph.

    `calls` names nodes that are function calls, with their kinds; other nodes are model calls, but for ToolNodes.
    `seconds` is how long nodes take. `rounds` is how often loops run, for all or by (last, first). With `subgraphs`, a
    node that is a graph is its nodes, named `node:inner`. A loop around one model call is taken for a model and its
    tools: the model continues its own conversation. KvarnError where a node cannot be reached.
    """
    calls, seconds = dict(calls or {}), dict(seconds or {})
    drawn = compiled.get_graph(xray=subgraphs)
    for said, names in (("calls", calls), ("seconds", seconds)):
        if unknown := [name for name in names if name not in drawn.nodes]:
            raise KvarnError(f"{said} names {unknown[0]!r}; the graph has {', '.join(map(repr, drawn.nodes))}.")
    children = _children(drawn)
    forward, back = _walk(children)
    reached = {"__start__"} | {child for _, child in forward}
    for node in children:
        if node not in reached:
            raise KvarnError(
                f"No edge of the graph leads to node {node!r}. If a node goes there with Command(goto=...), "
                f"say so in its return type: Command[Literal[{node!r}]]."
            )
    loops = [(last, first, _way_out(last, first, children, forward)) for last, first in back]
    kinds = _kinds(drawn, calls)
    inner = [_between(first, last, forward) for last, first, _ in loops]
    graph = Graph(name or compiled.get_name())
    for node in children:
        if node in _ENDS:
            continue
        after = [before for before, child in forward if child == node and before not in _ENDS]
        if node in kinds:
            graph.call(node, kinds[node], after=after, predict_time=seconds.get(node))
        else:
            alone = any(node in body and all(other in kinds for other in body - {node}) for body in inner)
            graph.llm(node, after=after, continues=node if alone else "", seconds=seconds.get(node, 1.0))
    for last, first, until in loops:
        turns = rounds if isinstance(rounds, int) else rounds.get((last, first), DEFAULT_ROUNDS)
        graph.loop(last, first, turns, until=until)
    return graph


def _kinds(drawn: Any, calls: Mapping[str, str]) -> dict[str, str]:
    """Function nodes with their kinds. A ToolNode with one tool is of its kind."""
    kinds = dict(calls)
    for id, node in drawn.nodes.items():
        if isinstance(node.data, ToolNode) and id not in kinds:
            tools = list(node.data.tools_by_name)
            kinds[id] = tools[0] if len(tools) == 1 else id
    return kinds


def _children(drawn: Any) -> dict[str, list[str]]:
    """Edges in the nodes' order; the begin and end of a subgraph, which do nothing, are passed through."""
    ids = list(drawn.nodes)
    direct: dict[str, list[str]] = {id: [] for id in ids}
    for edge in sorted(drawn.edges, key=lambda edge: (ids.index(edge.source), ids.index(edge.target))):
        direct[edge.source].append(edge.target)

    def passing(id: str) -> Iterator[str]:
        for child in direct[id]:
            if ":" in child and child.endswith(_ENDS):
                yield from passing(child)
            else:
                yield child

    return {id: list(dict.fromkeys(passing(id))) for id in ids if not (":" in id and id.endswith(_ENDS))}


def _walk(children: Mapping[str, list[str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Edges that go on, and edges that go back to a node the walk is still in: those close loops."""
    forward: list[tuple[str, str]] = []
    back: list[tuple[str, str]] = []
    seen, inside = {"__start__"}, ["__start__"]
    left = [iter(children["__start__"])]
    while inside:
        child = next(left[-1], None)
        if child is None:
            inside.pop()
            left.pop()
            continue
        if child in inside:
            back.append((inside[-1], child))
            continue
        forward.append((inside[-1], child))
        if child not in seen:
            seen.add(child)
            inside.append(child)
            left.append(iter(children[child]))
    return forward, back


def _between(first: str, last: str, forward: list[tuple[str, str]]) -> set[str]:
    after, before = {first}, {last}
    for _ in forward:
        after |= {child for parent, child in forward if parent in after}
        before |= {parent for parent, child in forward if child in before}
    return after & before


def _way_out(last: str, first: str, children: Mapping[str, list[str]], forward: list[tuple[str, str]]) -> str:
    """Where the last round ends, if `last` can only go back: at the latest node with a way out of the loop."""
    if children[last] != [first]:
        return ""
    body = _between(first, last, forward)
    ways_out = [id for id in body if any(child not in body for child in children[id])]
    return max(ways_out, key=lambda id: (len(_between(first, id, forward)), id), default="")


class ToolEvents(BaseCallbackHandler):
    """Give it to a run: `graph.invoke(state, {"callbacks": [ToolEvents(events)]})`; one may serve many runs.

    Tool calls are told by the id of the answer that asked for them. When a run ends, its `program` is closed.
    """

    def __init__(
        self, events: AgentEvents, *, program: str = "", tool_seconds: Mapping[str, float] | None = None
    ) -> None:
        self._events = events
        self._program = program
        self._calls = OpenCalls(tool_seconds)
        self._tool_runs: dict[UUID, str] = {}

    def on_llm_end(self, response: LLMResult, **_: Any) -> None:
        for generations in response.generations:
            for generation in generations:
                message = getattr(generation, "message", None)
                tools = {call["id"]: call["name"] for call in getattr(message, "tool_calls", ()) if call["id"]}
                if message is not None and tools:
                    # LangChain keeps no id of a streamed chat completion: then the server is told the tool call's.
                    self._calls.answered(message.response_metadata.get("id") or next(iter(tools)), tools)

    def on_tool_start(
        self, serialized: dict[str, Any], input_str: str, *, run_id: UUID, tool_call_id: str | None = None, **_: Any
    ) -> None:
        if tool_call_id is None:
            return
        self._tool_runs[run_id] = tool_call_id
        if event := self._calls.started(tool_call_id):
            self._events.send(event)

    def on_tool_end(self, output: Any, *, run_id: UUID, **_: Any) -> None:
        self._ended(run_id)

    def on_tool_error(self, error: BaseException, *, run_id: UUID, **_: Any) -> None:
        self._ended(run_id)

    def on_chain_end(self, outputs: Any, *, parent_run_id: UUID | None = None, **_: Any) -> None:
        self._close_program(parent_run_id)

    def on_chain_error(self, error: BaseException, *, parent_run_id: UUID | None = None, **_: Any) -> None:
        self._close_program(parent_run_id)

    def _ended(self, run_id: UUID) -> None:
        call = self._tool_runs.pop(run_id, None)
        if call is not None and (event := self._calls.ended(call)):
            self._events.send(event)

    def _close_program(self, parent_run_id: UUID | None) -> None:
        if parent_run_id is None and self._program:
            self._events.send(Close(program=self._program))
