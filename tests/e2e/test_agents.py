"""Agents and a real server, over sockets: clients that know nothing of it, clients that tell, tools and restarts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion

from tests.conftest import ServerProcess, serve, wait_until

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
QUESTION = [{"role": "user", "content": "How is the weather in Oslo, and what should I wear there? " * 8}]


@pytest.fixture(scope="module")
def agents() -> Iterator[ServerProcess]:
    with serve("--policy", "agentic", "--precision", "float32", "--kv-memory", "64MiB") as running:
        yield running


def ask(server: ServerProcess, messages: list[Any], **fields: Any) -> ChatCompletion:
    """What any client sends: a question, tools, at most the wish that one is called."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    answer: ChatCompletion = client.chat.completions.create(
        model="smollm2", messages=messages, tools=[TOOL], temperature=0, **fields
    )
    return answer


def ask_for_a_call(server: ServerProcess, **fields: Any) -> tuple[ChatCompletion, list[Any]]:
    """An answer that ends with a call, and the conversation with the call's result."""
    answer = ask(server, QUESTION, tool_choice="required", **fields)
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls" and message.tool_calls
    turn = {"role": "assistant", "content": None, "tool_calls": [call.model_dump() for call in message.tool_calls]}
    results = [{"role": "tool", "tool_call_id": call.id, "content": "4 degrees, rain"} for call in message.tool_calls]
    return answer, [*QUESTION, turn, *results]


def event(server: ServerProcess, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/agents/events", json=fields, timeout=30)


def node_of(server: ServerProcess, request: str) -> dict[str, Any]:
    """An answer as the server shows it; what it tells may be a fifth of a second old."""
    found: list[dict[str, Any]] = []

    def shown() -> bool:
        programs = httpx.get(f"{server.url}/v1/agents", timeout=30).json()["data"]
        found[:] = [node for program in programs for node in program["nodes"] if node["request"] == request]
        return len(found) == 1

    wait_until(shown, f"{request} is among the agents")
    return found[0]


def continued(server: ServerProcess) -> float:
    """Calls that a request went on from."""
    return server.metric("kvarn_agent_call_events_total", event="continued")


def test_a_client_that_says_nothing_extra_begins_and_ends_a_call(agents: ServerProcess) -> None:
    answer, conversation = ask_for_a_call(agents)
    node = node_of(agents, answer.id)
    assert (node["state"], node["tool"]) == ("calling", "get_weather")
    assert node["call"]["state"] == "kept" and node["call"]["held_blocks"] > 0
    assert node["blocks"]["device"] >= node["call"]["held_blocks"] - 1
    before = continued(agents)
    again = ask(agents, conversation, max_completion_tokens=4)
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert (again.usage.prompt_tokens_details.cached_tokens or 0) >= 128  # the held conversation was found
    over = event(agents, type="call_finish", request=answer.id)
    assert over.status_code == 200 and over.json()["state"] == "dead"  # gone on from
    wait_until(lambda: continued(agents) > before, "the call is counted")


def test_a_client_that_tells_is_told_where_its_call_stands(agents: ServerProcess) -> None:
    hints = {
        "program": "trip",
        "agent": "planner",
        "node": "plan",
        "after": ["ask"],
        "critical": True,
        "tool_seconds": 9,
    }
    answer, _ = ask_for_a_call(agents, extra_body={"kv_hints": {"agent": hints | {"tool_seconds": 9}}})
    told: Any = answer.model_extra["kv_hints"] if answer.model_extra else {}
    assert {each["outcome"] for each in told["outcomes"]} == {"accepted"}
    node = node_of(agents, answer.id)
    assert (node["name"], node["agent"], node["after"], node["critical"]) == ("plan", "planner", ["ask"], True)
    assert 4 < node["call"]["expected_seconds"] < 13
    begun = event(agents, type="call_start", request=answer.id, tool="get_weather", seconds=30, stages=["find", "read"])
    assert begun.status_code == 200 and 15 < begun.json()["expected_seconds"] <= 30  # adds to what was concluded
    assert event(agents, type="call_start", request=answer.id, tool="get_weather").status_code == 200  # twice
    wrong = event(agents, type="call_start", request=answer.id, tool="bake")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (409, "tool")
    assert event(agents, type="call_progress", request=answer.id, stage="read").status_code == 200
    stage = event(agents, type="call_progress", request=answer.id, stage="bake")
    assert (stage.status_code, stage.json()["error"]["param"]) == (400, "stage")
    done = event(agents, type="call_finish", request=answer.id, seconds=3.0)
    assert done.status_code == 200 and done.json()["remaining_seconds"] == 0
    assert event(agents, type="call_finish", request=answer.id).json()["state"] == done.json()["state"]
    closed = event(agents, type="close", program="trip")
    assert closed.status_code == 200 and closed.json()["closed"] == 1
    late = event(agents, type="call_progress", request=answer.id, fraction=0.5)
    assert (late.status_code, late.json()["error"]["code"]) == (409, "conflict")


def test_a_call_id_names_its_answer_and_a_kept_conversation_needs_no_tool(agents: ServerProcess) -> None:
    answer, _ = ask_for_a_call(agents)
    calls = answer.choices[0].message.tool_calls or []
    assert event(agents, type="close", request=calls[0].id).json()["closed"] == 1
    kept = httpx.post(
        f"{agents.url}/v1/completions",
        json={
            "prompt": "Once upon a time " * 20, "max_tokens": 4,
            "kv_hints": {"actions": [{"verb": "retain", "seconds": 60}]},
        },
        timeout=60,
    )  # fmt: skip
    assert kept.json()["kv_hints"]["outcomes"] == [{"hint": "kv_hints.actions.0", "outcome": "accepted"}]
    assert node_of(agents, kept.json()["id"])["state"] == "retained"
    assert event(agents, type="close", request=kept.json()["id"]).status_code == 200


def test_what_the_engine_does_not_know_is_not_found(agents: ServerProcess) -> None:
    unknown = event(agents, type="call_finish", request="chatcmpl-0")
    assert unknown.status_code == 404 and "'chatcmpl-0'" in unknown.json()["error"]["message"]
    plain = httpx.post(f"{agents.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=30).json()
    assert event(agents, type="call_start", request=plain["id"]).status_code == 404  # no tools, no hints


def test_a_restart_between_start_and_finish_loses_the_call_and_nothing_else(agents: ServerProcess) -> None:
    answer, conversation = ask_for_a_call(agents)
    expected = ask(agents, conversation, max_completion_tokens=8).choices[0].message
    os.kill(agents.engine_pid(), signal.SIGKILL)
    wait_until(
        lambda: event(agents, type="call_finish", request=answer.id).status_code == 503, "the dead engine is noticed"
    )
    again = ask(agents, conversation, max_completion_tokens=8).choices[0].message
    assert again.content == expected.content
    assert event(agents, type="call_finish", request=answer.id).status_code == 404
