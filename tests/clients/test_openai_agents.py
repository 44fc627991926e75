"""Hooks of real runs of the Agents SDK, heard by a real server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, RunConfig, Runner, function_tool
from openai import AsyncOpenAI

from kvarn.clients.events import AsyncAgentEvents
from kvarn.clients.openai_agents import ToolEvents, with_hints
from kvarn.serving.agents.hints import AgentHints


@function_tool
def look_up(what: str) -> str:
    """Look something up."""
    return f"{what} is found"


@function_tool
async def fetch(what: str) -> str:
    """Fetch something."""
    return what


@function_tool
def break_down(what: str) -> str:
    """Break."""
    raise ValueError("it broke")


def run(
    server, *tools: Any, hints: AgentHints | None = None, handoffs: Any = (), streamed: bool = False, **known: Any
) -> Any:
    async def whole() -> Any:
        async with (
            AsyncOpenAI(base_url=server.base_url, api_key="none") as client,
            AsyncAgentEvents(server.base_url) as events,
        ):
            model = OpenAIChatCompletionsModel("m", client)
            settings = ModelSettings(extra_headers={"x-own": "kept"}, temperature=0.5)
            others = [Agent(name=name, model=model) for name in handoffs]
            agent = Agent(name="assistant", model=model, tools=list(tools), model_settings=settings, handoffs=others)
            if hints is not None:
                agent = with_hints(agent, hints)
            quiet = RunConfig(tracing_disabled=True)
            hooks = ToolEvents(events, **known)
            if not streamed:
                return await Runner.run(agent, "Look it up.", hooks=hooks, run_config=quiet)
            result = Runner.run_streamed(agent, "Look it up.", hooks=hooks, run_config=quiet)
            async for _ in result.stream_events():
                pass
            return result

    return asyncio.run(whole())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_tells_of_its_tools_as_one_call_and_closes_its_program(server, streamed: bool):
    result = run(server, look_up, fetch, streamed=streamed, program="run 1", tool_seconds={"fetch": 1.0})
    assert result.final_output == "It is done."
    assert server.events == [
        {"type": "call_start", "request": "chat-1", "tool": "fetch", "seconds": 1.0},
        {"type": "call_finish", "request": "chat-1"},
        {"type": "close", "program": "run 1"},
    ]


def test_hints_go_with_every_request_beside_the_agents_own_settings(server):
    run(server, look_up, hints=AgentHints(program="run 1", agent="assistant", depth=2))
    assert len(server.requests) == 2
    for headers, body in server.requests:
        assert (headers["x-session-id"], headers["x-own"], body["temperature"]) == ("run 1", "kept", 0.5)
        agent = {"program": "run 1", "agent": "assistant", "depth": 2}
        assert body["kv_hints"] == {"protocol_version": 1, "agent": agent}


def test_a_tool_that_breaks_has_ended_too(server):
    assert run(server, break_down).final_output == "It is done."
    assert [event["type"] for event in server.events] == ["call_start", "call_finish"]


def test_a_handoff_is_no_tool(server):
    result = run(server, handoffs=["other"])
    assert (result.last_agent.name, result.final_output) == ("other", "It is done.")
    assert server.events == []


@pytest.mark.parametrize("status", [404, 409, 503])
def test_a_server_that_refuses_breaks_no_run(server, caplog, status):
    server.event_status = status
    assert run(server, look_up).final_output == "It is done."
    assert [record.levelname for record in caplog.records if record.name == "kvarn.clients"] == ["WARNING"]
