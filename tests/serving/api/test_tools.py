"""Function tools: what the model is told, what it is forced to, and how its calls come out."""

from __future__ import annotations

import json

import openai
import pytest

from tests.serving.api.conftest import Server

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"the {name}",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("weather", "time")
]
WEATHER = '{"name": "weather", "arguments": {"city": "Łódź"}}'
CALLS = f'<tool_call>[{WEATHER}, {{"name": "time", "arguments": {{"city": "Oslo"}}}}]</tool_call>'


def say(client: openai.OpenAI, text: str, **fields: object) -> openai.types.chat.ChatCompletion:
    fields = {"tools": TOOLS} | fields
    return client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": text}], **fields)  # type: ignore[call-overload,no-any-return]


def test_calls_come_out_of_the_text(client: openai.OpenAI) -> None:
    choice = say(client, CALLS).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert [call.function.name for call in choice.message.tool_calls or ()] == ["weather", "time"]
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Łódź"}  # type: ignore[index,union-attr]
    assert len({call.id for call in choice.message.tool_calls or ()}) == 2


def test_calls_stream(client: openai.OpenAI) -> None:
    chunks = list(say(client, "Let me see. " + CALLS, stream=True))  # type: ignore[call-overload]
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas).strip() == "Let me see."
    calls: dict[int, dict[str, str]] = {}
    for piece in (piece for delta in deltas for piece in delta.tool_calls or ()):
        call = calls.setdefault(piece.index, {"name": "", "arguments": "", "id": ""})
        call["id"] += piece.id or ""
        call["name"] += piece.function.name or ""
        call["arguments"] += piece.function.arguments or ""
    assert [call["name"] for call in calls.values()] == ["weather", "time"]
    assert json.loads(calls[1]["arguments"]) == {"city": "Oslo"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_one_call_at_a_time(client: openai.OpenAI) -> None:
    calls = say(client, CALLS, parallel_tool_calls=False).choices[0].message.tool_calls
    assert [call.function.name for call in calls or ()] == ["weather"]


def test_plain_text_stays_text_with_tools_on_offer(client: openai.OpenAI) -> None:
    choice = say(client, "no call here").choices[0]
    assert choice.message.content == "no call here" and choice.finish_reason == "stop" and not choice.message.tool_calls


def test_choice_none_hides_the_tools(client: openai.OpenAI, server: Server) -> None:
    with_tools, without = say(client, "x"), say(client, "x", tool_choice="none")
    assert without.usage.prompt_tokens < with_tools.usage.prompt_tokens  # type: ignore[union-attr]
    assert say(client, CALLS, tool_choice="none").choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    ("choice", "allowed"),
    [("required", {"weather", "time"}), ({"type": "function", "function": {"name": "time"}}, {"time"})],
)
def test_a_forced_choice_becomes_a_grammar(
    client: openai.OpenAI, server: Server, choice: object, allowed: set[str]
) -> None:
    answer = say(client, CALLS, tool_choice=choice)
    (line,) = [line for line in server.engine_log("submit") if line["id"].startswith(answer.id)]
    source = line["params"]["grammar"]["source"]
    assert {name for name in ("weather", "time") if json.dumps({"const": name})[1:-1] in source} == allowed


def test_results_of_calls_go_back_to_the_model(client: openai.OpenAI, server: Server) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    answer = client.chat.completions.create(
        model="smollm2",
        tools=TOOLS,  # type: ignore[arg-type]
        messages=[
            {"role": "user", "content": "How is it in Oslo?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},  # type: ignore[typeddict-item,list-item]
            {"role": "tool", "tool_call_id": "call_1", "content": "rain, 4 degrees"},
        ],
    )
    assert "rain, 4 degrees" in (answer.choices[0].message.content or "")


def test_impossible_choices_are_refused(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "nothing"}}
    cases = [{"tool_choice": named}, {"tool_choice": "required", "tools": []}, {"tools": [TOOLS[0], TOOLS[0]]}]
    for fields in cases:
        with pytest.raises(openai.BadRequestError):
            say(client, "x", **fields)
