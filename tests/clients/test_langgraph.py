"""Graphs imported from real compiled LangGraph graphs; callbacks of real runs, heard by a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command

from kvarn.clients.events import AgentEvents, request_extras
from kvarn.clients.langgraph import ToolEvents, from_langgraph
from kvarn.errors import KvarnError
from kvarn.serving.agents.hints import AgentHints


@tool
def look_up(what: str) -> str:
    """Look something up."""
    return f"{what} is found"


@tool
def break_down(what: str) -> str:
    """Break."""
    raise ValueError("it broke")


def nothing(state: MessagesState) -> MessagesState:
    return state


def drawn(nodes: dict[str, Any], *edges: tuple[str, str]) -> StateGraph:
    graph = StateGraph(MessagesState)
    for name, action in nodes.items():
        graph.add_node(name, action)
    for edge in edges:
        graph.add_edge(*edge)
    return graph


def tool_agent(model: Callable[[MessagesState], Any] = nothing, tools: Any = (look_up,)) -> Any:
    graph = drawn({"model": model, "tools": ToolNode(list(tools))}, (START, "model"), ("tools", "model"))
    graph.add_conditional_edges("model", tools_condition)
    return graph.compile(name="assistant")


def test_a_line():
    compiled = drawn(
        {"write": nothing, "check": nothing}, (START, "write"), ("write", "check"), ("check", END)
    ).compile()
    plan = from_langgraph(compiled, name="line", seconds={"write": 4}, calls={"check": "external_test"}).plan()
    assert plan.name == "line"
    assert [(n.name, n.kind, n.seconds, n.parents) for n in plan.nodes.values()] == [
        ("write", "", 4, ()),
        ("check", "external_test", 5, ("write",)),
    ]


def test_branches_and_a_join():
    compiled = drawn(
        {"plan": nothing, "left": nothing, "right": nothing, "answer": nothing},
        (START, "plan"), ("plan", "left"), ("plan", "right"), ("left", "answer"), ("right", "answer"), ("answer", END),
    ).compile()  # fmt: skip
    nodes = from_langgraph(compiled).plan().nodes
    assert nodes["left"].join == nodes["right"].join == "answer"
    assert set(nodes["answer"].parents) == {"left", "right"}
    assert nodes["plan"].fan_out == 2


def test_a_model_with_tools_is_a_loop_that_ends_at_the_model():
    graph = from_langgraph(tool_agent(), rounds=2, seconds={"tools": 3})
    assert graph.name == "assistant"
    nodes = graph.plan().nodes
    assert list(nodes) == ["model", "tools", "model#2"]
    assert nodes["model#2"].continues == "model"
    assert (nodes["model"].tool, nodes["model"].tool_seconds) == ("tools", 3)
    assert nodes["tools"].kind == "look_up", "a node with one tool is known by it"
    assert graph.plan().hints("model", "run").tool == "look_up"


def test_a_conditional_loop_of_models_and_what_comes_after():
    graph = drawn(
        {"draft": nothing, "review": nothing, "publish": nothing},
        (START, "draft"),
        ("draft", "review"),
        ("publish", END),
    )
    graph.add_conditional_edges("review", lambda state: "publish", ["draft", "publish"])
    imported = from_langgraph(graph.compile(), rounds={("review", "draft"): 2})
    nodes = imported.plan().nodes
    assert list(nodes) == ["draft", "review", "draft#2", "review#2", "publish"]
    assert nodes["publish"].parents == ("review#2",)
    assert {node.continues for node in nodes.values()} == {""}


def test_subgraphs_are_their_nodes():
    graph = drawn(
        {"ask": nothing, "agent": tool_agent(), "end": nothing}, (START, "ask"), ("ask", "agent"), ("agent", "end")
    )
    compiled = graph.compile()
    nodes = from_langgraph(compiled, rounds=2).plan().nodes
    assert list(nodes) == ["ask", "agent:model", "agent:tools", "agent:model#2", "end"]
    assert nodes["end"].parents == ("agent:model#2",)
    assert list(from_langgraph(compiled, subgraphs=False).plan().nodes) == ["ask", "agent", "end"]


def test_nodes_reached_by_commands_are_seen_where_the_type_says_so():
    def said(state: MessagesState) -> Command[Literal["next"]]:
        return Command(goto="next")

    graph = drawn({"first": said, "next": nothing}, (START, "first"))
    assert from_langgraph(graph.compile()).plan().nodes["next"].parents == ("first",)


def test_a_node_that_only_a_command_reaches_is_refused():
    graph = drawn({"first": lambda state: Command(goto="next"), "next": nothing}, (START, "first"))
    with pytest.raises(KvarnError, match=r"to node 'next'.*Command\[Literal\['next'\]\]"):
        from_langgraph(graph.compile())


def test_names_that_the_graph_does_not_have_are_refused():
    with pytest.raises(KvarnError, match="seconds names 'modell'; the graph has"):
        from_langgraph(tool_agent(), seconds={"modell": 2})


def asking(server, *tools: Any, **extras: Any) -> Callable[[MessagesState], Any]:
    model = ChatOpenAI(base_url=server.base_url, api_key="none", model="m").bind_tools(list(tools))
    return lambda state: {"messages": [model.invoke(state["messages"], **extras)]}


QUESTION = {"messages": [("user", "Look it up.")]}


def test_a_run_tells_of_its_tool_by_the_answer_that_asked(server):
    extras = request_extras(AgentHints(program="run 1", agent="assistant"))
    compiled = tool_agent(asking(server, look_up, **extras))
    with AgentEvents(server.base_url) as events:
        heard = ToolEvents(events, program="run 1", tool_seconds={"look_up": 2.0})
        state = compiled.invoke(QUESTION, {"callbacks": [heard]})
    assert state["messages"][-1].content == "It is done."
    assert server.events == [
        {"type": "call_start", "request": "chat-1", "tool": "look_up", "seconds": 2.0},
        {"type": "call_finish", "request": "chat-1"},
        {"type": "close", "program": "run 1"},
    ]
    for headers, body in server.requests:
        assert headers["x-session-id"] == "run 1"
        assert body["kv_hints"] == {"protocol_version": 1, "agent": {"program": "run 1", "agent": "assistant"}}


def test_a_streamed_run_tells_of_its_tool_by_the_tool_call(server):
    with AgentEvents(server.base_url) as events:
        pieces = tool_agent(asking(server, look_up)).stream(
            QUESTION, {"callbacks": [ToolEvents(events)]}, stream_mode="messages"
        )
        assert "It is done." in [piece.content for piece, _ in pieces]
    assert all(body["stream"] for _, body in server.requests)
    assert server.events == [
        {"type": "call_start", "request": "call-1-0", "tool": "look_up"},
        {"type": "call_finish", "request": "call-1-0"},
    ]


def test_a_run_in_asyncio_tells_of_two_tools_as_one_call(server):
    @tool
    async def fetch(what: str) -> str:
        """Fetch something."""
        return what

    compiled = tool_agent(asking(server, look_up, fetch), [look_up, fetch])
    with AgentEvents(server.base_url) as events:
        asyncio.run(compiled.ainvoke(QUESTION, {"callbacks": [ToolEvents(events, tool_seconds={"fetch": 1.0})]}))
    assert server.events == [
        {"type": "call_start", "request": "chat-1", "tool": "fetch", "seconds": 1.0},
        {"type": "call_finish", "request": "chat-1"},
    ]


def test_a_tool_that_breaks_has_ended_too(server):
    compiled = tool_agent(asking(server, break_down), [break_down])
    with AgentEvents(server.base_url) as events, pytest.raises(ValueError, match="it broke"):
        compiled.invoke(QUESTION, {"callbacks": [ToolEvents(events, program="p")]})
    assert [event["type"] for event in server.events] == ["call_start", "call_finish", "close"]


def test_a_server_without_the_endpoint_breaks_no_run(server, caplog):
    server.event_status = 404
    with AgentEvents(server.base_url) as events:
        state = tool_agent(asking(server, look_up)).invoke(QUESTION, {"callbacks": [ToolEvents(events)]})
    assert state["messages"][-1].content == "It is done."
    assert [record.levelname for record in caplog.records if record.name == "kvarn.clients"] == ["WARNING"]
