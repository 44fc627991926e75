"""Two agents of OpenAI's Agents SDK with a slow tool, on a kvarn server that is told when the tool starts and ends.

    kvarn serve --port 8000
    python examples/agents_openai.py --base-url http://127.0.0.1:8000/v1

Needs the extra: pip install 'kvarn[agents]'. The bundled model is tiny: it has to be made to call the tool
(tool_choice), and it makes little of the answer.
"""

from __future__ import annotations

import argparse
import asyncio
import uuid
from typing import Any

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, RunConfig, Runner, function_tool
from openai import AsyncOpenAI

from kvarn.clients.events import AsyncAgentEvents
from kvarn.clients.openai_agents import ToolEvents, with_hints
from kvarn.serving.agents.events import Close
from kvarn.serving.agents.graph import Graph


def drawing(tool_seconds: float) -> Graph:
    """A reporter looks something up; an editor shortens what the reporter says."""
    graph = Graph("report")
    graph.llm("reporter")
    graph.call("search_web", after=["reporter"], predict_time=tool_seconds)
    graph.llm("report", agent="reporter", continues="reporter", after=["search_web"])
    graph.llm("editor", after=["report"])
    return graph


async def run(base_url: str, model_name: str, tool_seconds: float) -> None:
    @function_tool
    async def search_web(query: str) -> str:
        """Search the web."""
        await asyncio.sleep(tool_seconds)
        return "Oslo: light rain, 7 degrees, wind from the west."

    program = f"report-{uuid.uuid4().hex[:8]}"
    plan = drawing(tool_seconds).plan()
    for node in plan.nodes.values():
        print(f"plan: {node.name}: {node.seconds} s, {node.remaining_seconds} s to the end, tool: {node.tool or '-'}")
    quiet = RunConfig(tracing_disabled=True)
    async with AsyncOpenAI(base_url=base_url, api_key="none") as client, AsyncAgentEvents(base_url) as events:
        model: Any = OpenAIChatCompletionsModel(model_name, client)
        # The SDK asks once with tool_choice "required"; after the tool it goes back to what the model likes.
        must_call = ModelSettings(tool_choice="required", temperature=0, max_tokens=64)
        reporter = Agent(
            name="reporter", instructions="Search the web.", model=model, tools=[search_web], model_settings=must_call
        )
        editor = Agent(
            name="editor", instructions="Say it in five words.", model=model,
            model_settings=ModelSettings(temperature=0, max_tokens=32),
        )  # fmt: skip
        hooks = ToolEvents(events, tool_seconds={search_web.name: tool_seconds})
        reporter, editor = (with_hints(agent, plan.hints(agent.name, program)) for agent in (reporter, editor))
        report = await Runner.run(reporter, "What is the weather in Oslo?", hooks=hooks, run_config=quiet)
        for answer in report.raw_responses:
            found = answer.usage.input_tokens_details.cached_tokens
            print(f"reporter: {found} of {answer.usage.input_tokens} prompt tokens were there already")
        for item in report.new_items:
            print(f"reporter: {item.type}: {getattr(item.raw_item, 'arguments', '') or getattr(item, 'output', '')}")
        short = await Runner.run(editor, str(report.final_output), hooks=hooks, run_config=quiet)
        await events.send(Close(program=program))
    print("report:", report.final_output)
    print("editor:", short.final_output)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    options.add_argument("--model", default="smollm2")
    options.add_argument("--tool-seconds", type=float, default=2.0)
    chosen = options.parse_args()
    asyncio.run(run(chosen.base_url, chosen.model, chosen.tool_seconds))


if __name__ == "__main__":
    main()
