"""The examples of agents, each against a real server; the Agents SDK over the Responses API."""

from __future__ import annotations

import asyncio
import re
import runpy
import sys
from pathlib import Path

import pytest
from agents import Agent, ModelSettings, OpenAIResponsesModel, RunConfig, Runner, function_tool
from openai import AsyncOpenAI

from kvarn.clients.events import AsyncAgentEvents
from kvarn.clients.openai_agents import ToolEvents, with_hints
from kvarn.serving.agents.hints import AgentHints
from tests.conftest import ServerProcess

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(("name", "end"), [("agents_langgraph", "answer"), ("agents_openai", "editor")])
def test_a_model_calls_a_tool_and_goes_on_with_what_was_computed(
    server: ServerProcess, monkeypatch, capsys, caplog, name: str, end: str
):
    url = f"{server.url}/v1"
    monkeypatch.setattr(sys, "argv", [name, "--base-url", url, "--tool-seconds", "0.1"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    found = [int(tokens) for tokens in re.findall(r"(\d+) of \d+ prompt tokens were there already", printed)]
    assert len(found) >= 2, "the model was asked again after the tool"
    assert found[1] > 100
    assert re.search(f"^{end}: ", printed, re.MULTILINE)
    assert [record.message for record in caplog.records if record.name == "kvarn.clients"] == []


def test_events_name_answers_of_the_responses_api(server: ServerProcess, caplog):
    @function_tool
    def look_up() -> str:
        """Look at the weather."""
        return "It rains."

    async def run() -> list[str]:
        url = f"{server.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none") as client, AsyncAgentEvents(url) as events:
            settings = ModelSettings(tool_choice="required", parallel_tool_calls=False, temperature=0)
            model = OpenAIResponsesModel("smollm2", client)
            agent = Agent(
                name="assistant", model=model, tools=[look_up], model_settings=settings,
                tool_use_behavior="stop_on_first_tool",
            )  # fmt: skip
            agent = with_hints(agent, AgentHints(program="weather", agent="assistant"))
            hooks = ToolEvents(events, program="weather")
            result = await Runner.run(agent, "Does it rain?", hooks=hooks, run_config=RunConfig(tracing_disabled=True))
            return [item.type for item in result.new_items]

    assert {"tool_call_item", "tool_call_output_item"} <= set(asyncio.run(run()))
    assert [record.message for record in caplog.records if record.name == "kvarn.clients"] == []
