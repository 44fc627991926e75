"""OpenAI's Agents SDK: hooks that tell the server when tools start and end, and hints in an agent's requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from agents import Agent, Handoff, ModelResponse, ModelSettings, RunHooks
from agents.models.fake_id import FAKE_RESPONSES_ID
from openai.types.responses import ResponseFunctionToolCall

from kvarn.clients.calls import OpenCalls
from kvarn.clients.events import AsyncAgentEvents, request_extras
from kvarn.serving.agents.events import Close
from kvarn.serving.agents.hints import AgentHints


def with_hints(agent: Any, hints: AgentHints) -> Any:
    """A copy of the agent whose requests carry `hints`, beside what its model settings say already."""
    settings: ModelSettings = agent.model_settings
    extras = request_extras(hints)
    headers = {**(settings.extra_headers or {}), **extras["extra_headers"]}
    body = {**(settings.extra_body or {}), **extras["extra_body"]}
    return agent.clone(model_settings=replace(settings, extra_headers=headers, extra_body=body))


class ToolEvents(RunHooks):
    """Give it to a run: `Runner.run(agent, input, hooks=ToolEvents(events))`; one may serve many runs.

    Tool calls are told by the id of the answer that asked for them. When an agent has its final answer, `program` is
    closed.
    """

    def __init__(
        self, events: AsyncAgentEvents, *, program: str = "", tool_seconds: Mapping[str, float] | None = None
    ) -> None:
        self._events = events
        self._program = program
        self._calls = OpenCalls(tool_seconds)

    async def on_llm_end(self, context: Any, agent: Any, response: ModelResponse) -> None:
        """Remember the answer's id. The SDK has no tool events for a handoff, though it is asked for like a tool."""
        handoffs = {
            each.tool_name if isinstance(each, Handoff) else Handoff.default_tool_name(each) for each in agent.handoffs
        }
        asked = [
            item for item in response.output if isinstance(item, ResponseFunctionToolCall) and item.name not in handoffs
        ]
        tools = {item.call_id: item.name for item in asked}
        self._calls.answered(_answer_id(response) or next(iter(tools), ""), tools)

    async def on_tool_start(self, context: Any, agent: Any, tool: Any) -> None:
        if event := self._calls.started(getattr(context, "tool_call_id", "")):
            await self._events.send(event)

    async def on_tool_end(self, context: Any, agent: Any, tool: Any, result: object) -> None:
        if event := self._calls.ended(getattr(context, "tool_call_id", "")):
            await self._events.send(event)

    async def on_agent_end(self, context: Any, agent: Agent[Any], output: Any) -> None:
        if self._program:
            await self._events.send(Close(program=self._program))


def _answer_id(response: ModelResponse) -> str:
    """The Responses API's id, or where the SDK keeps a chat completion's; a streamed one's is a placeholder."""
    if response.response_id and response.response_id != FAKE_RESPONSES_ID:
        return str(response.response_id)
    for item in response.output:
        data = getattr(item, "provider_data", None)
        if data and data.get("response_id"):
            return str(data["response_id"])
    return ""
