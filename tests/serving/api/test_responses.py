"""/v1/responses through the official client."""

from __future__ import annotations

import json

import openai
import pytest

from tests.serving.api.conftest import Server

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}
CALL = '<tool_call>[{"name": "weather", "arguments": {"city": "Oslo"}}]</tool_call>'


def test_text(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="smollm2", input="say this", instructions="You repeat.")
    assert answer.output_text == "say this" and answer.status == "completed" and answer.instructions == "You repeat."
    assert answer.usage is not None and answer.usage.input_tokens_details.cached_tokens == 16
    cut = client.responses.create(model="smollm2", input="one two three four", max_output_tokens=2)
    assert cut.status == "incomplete" and cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"


def test_the_stream_tells_the_same_story(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="smollm2", input="say this", stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "say this"
    assert events[-1].response.output_text == "say this"
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_the_clients_own_accumulator_follows(client: openai.OpenAI) -> None:
    with client.responses.stream(model="smollm2", input="Now: " + CALL, tools=[TOOL]) as stream:  # type: ignore[list-item]
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["message", "function_call"]
    assert final.output[1].name == "weather"  # type: ignore[union-attr]
    assert json.loads(final.output[1].arguments) == {"city": "Oslo"}  # type: ignore[union-attr]


def test_a_conversation_with_a_call(client: openai.OpenAI) -> None:
    first = client.responses.create(model="smollm2", input=CALL, tools=[TOOL])  # type: ignore[list-item]
    call = first.output[0]
    assert call.type == "function_call"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    question = {"role": "user", "content": [{"type": "input_text", "text": "How is Oslo?"}]}
    second = client.responses.create(model="smollm2", input=[question, call.model_dump(), result])  # type: ignore[list-item]
    assert "rain" in second.output_text


def test_schema_becomes_a_grammar(client: openai.OpenAI, server: Server) -> None:
    schema = {"type": "object", "properties": {}}
    format = {"type": "json_schema", "name": "x", "schema": schema}
    answer = client.responses.create(model="smollm2", input="x", text={"format": format})  # type: ignore[typeddict-item]
    (line,) = [line for line in server.engine_log("submit") if line["id"].startswith(answer.id)]
    assert json.loads(line["params"]["grammar"]["source"]) == schema


def test_stored_conversations_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="previous_response_id"):
        client.responses.create(model="smollm2", input="x", previous_response_id="resp_1")


def test_incomplete_items_are_refused(client: openai.OpenAI) -> None:
    for item in ({"type": "function_call"}, {"type": "function_call_output"}, {"role": "user"}):
        with pytest.raises(openai.BadRequestError):
            client.responses.create(model="smollm2", input=[item])  # type: ignore[list-item]
