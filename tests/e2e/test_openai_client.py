"""The official client drives every endpoint of a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from tests.conftest import ServerProcess, serve

MODEL = "smollm2"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: OpenAI):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=30)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_segments_and_a_round_of_one(client: OpenAI, server: ServerProcess):
    marked = [{"role": "system", "content": "Be brief."}, QUESTION[0] | {"segment": "shared", "segment_id": "q"}]
    alone = {"extra_body": {"round": {"id": "alone", "size": 1, "agent": "me"}}}
    answer = client.chat.completions.create(model=MODEL, messages=marked, temperature=0, max_tokens=30, **alone)
    assert "Paris" in answer.choices[0].message.content
    with server.client() as http:
        tokens = http.post("/tokenize", json={"messages": marked}).json()["tokens"]
        assert answer.usage.prompt_tokens == len(tokens)
        parts = [{"kind": "shared", "content": tokens[:20]}, {"kind": "task", "content": tokens[20:]}]
        plain = {"segments": parts, "temperature": 0, "max_tokens": 30} | alone["extra_body"]
        told = http.post("/v1/completions", json=plain).json()
        assert "Paris" in told["choices"][0]["text"] and told["usage"]["prompt_tokens"] == len(tokens)
        assert http.get("/v1/rounds").status_code == 200


def test_streamed_chat_is_the_same_text_with_usage(client: OpenAI):
    settings = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 30}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 32


def test_equal_prefix_is_reported_as_cached(client: OpenAI):
    prompt = "Every good story starts somewhere. " * 20
    first = client.completions.create(model=MODEL, prompt=prompt + "A", max_tokens=1)
    second = client.completions.create(model=MODEL, prompt=prompt + "B", max_tokens=1)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 112


def test_n_answers_differ_and_a_seed_repeats_them(client: OpenAI):
    settings = {"model": MODEL, "prompt": "A random word:", "max_tokens": 12, "temperature": 1.2, "n": 3, "seed": 11}
    texts = [[choice.text for choice in client.completions.create(**settings).choices] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1


def test_stop_strings_are_never_shown(client: OpenAI):
    settings = {"model": MODEL, "prompt": "1, 2, 3, 4, 5, 6,", "max_tokens": 40, "temperature": 0}
    free = client.completions.create(**settings).choices[0].text
    assert "10" in free
    stopped = client.completions.create(**settings, stop=["10", "never"])
    assert stopped.choices[0].text == free[: free.index("10")]
    assert stopped.choices[0].finish_reason == "stop"
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**settings, stop="10", stream=True)]
    assert "".join(pieces) == stopped.choices[0].text


def test_logprobs_of_chat_and_completions(client: OpenAI):
    chat = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    for token in chat.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == max(alternative.logprob for alternative in token.top_logprobs) <= 0
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token
    legacy = client.completions.create(model=MODEL, prompt="The sky is", temperature=0, max_tokens=4, logprobs=2)
    assert len(legacy.choices[0].logprobs.tokens) == len(legacy.choices[0].logprobs.token_logprobs) == 4


def test_completions_take_lists_tokens_and_echo(client: OpenAI, server: ServerProcess):
    answer = client.completions.create(model=MODEL, prompt=["One", "Two"], max_tokens=3, temperature=0, echo=True)
    assert [choice.text[:3] for choice in answer.choices] == ["One", "Two"]
    with server.client() as http:
        tokens = http.post("/tokenize", json={"model": MODEL, "prompt": "One"}).json()["tokens"]
        assert http.post("/detokenize", json={"model": MODEL, "tokens": tokens}).json()["prompt"] == "One"
    by_tokens = client.completions.create(model=MODEL, prompt=tokens, max_tokens=3, temperature=0)
    assert "One" + by_tokens.choices[0].text == answer.choices[0].text


def test_json_schema(client: OpenAI):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Invent a person."}],
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}},
        max_tokens=80,
        temperature=1.0,
        seed=5,
    )
    person = json.loads(answer.choices[0].message.content)
    assert set(person) == {"name", "age"} and 0 <= person["age"] <= 130


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_forced_tool_call(client: OpenAI, choice: object):
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    settings = {"model": MODEL, "messages": messages, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 80}
    answer = client.chat.completions.create(**settings, temperature=0)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert set(json.loads(call.function.arguments)) == {"city"}
    assert answer.choices[0].finish_reason == "tool_calls"

    name, arguments = "", ""
    for chunk in client.chat.completions.create(**settings, temperature=0, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or []:
            name += delta.function.name or ""
            arguments += delta.function.arguments or ""
    assert name == "get_weather" and arguments == call.function.arguments

    messages += [
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": '{"sky": "sunny"}'},
    ]
    final = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], max_tokens=20)
    assert final.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_responses(client: OpenAI):
    answer = client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=30)
    assert "Paris" in answer.output_text and answer.status == "completed"
    events = list(
        client.responses.create(model=MODEL, input=QUESTION, temperature=0, max_output_tokens=30, stream=True)
    )
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == answer.output_text == events[-1].response.output_text


def test_responses_with_a_function(client: OpenAI):
    tool = {"type": "function", "name": "get_weather", "parameters": WEATHER["function"]["parameters"], "strict": True}
    settings = {"model": MODEL, "tools": [tool], "tool_choice": "required", "max_output_tokens": 80, "temperature": 0}
    question = [{"role": "user", "content": "Weather in Oslo?"}]
    answer = client.responses.create(**settings, input=question)
    (call,) = [item for item in answer.output if item.type == "function_call"]
    assert set(json.loads(call.arguments)) == {"city"}
    follow_up = [*question, call.model_dump(exclude_none=True)]
    follow_up.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
    assert client.responses.create(model=MODEL, input=follow_up, max_output_tokens=10).output


def test_models(client: OpenAI):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": 5}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"top_k": -5}}, "top_k"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 5}}}},
         "response_format"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
    ],
)  # fmt: skip
def test_impossible_values_are_400_and_name_the_field(client: OpenAI, settings: dict[str, object], field: str):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, **{"max_tokens": 5, **settings})
    assert field in (caught.value.param or caught.value.body["message"])


def test_prompt_longer_than_context(client: OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="word " * 20_000, max_tokens=5)
    assert caught.value.code == "context_length_exceeded"


def test_unknown_model(client: OpenAI):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-99", messages=QUESTION)
    assert caught.value.code == "model_not_found"


def test_wrong_requests_have_the_error_shape(server: ServerProcess):
    with server.client() as http:
        cases = [
            (http.post("/v1/completions", content=b"{nope", headers={"content-type": "application/json"}), 400),
            (http.post("/v1/completions", json={"model": MODEL, "prompt": {"a": 1}}), 400),
            (http.get("/v1/nothing"), 404),
            (http.delete("/v1/models"), 405),
        ]
    for answer, status in cases:
        assert answer.status_code == status
        assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}


def test_keys():
    with serve("--api-key", "right", "--max-body", "10KB", "--kv-memory", "32MiB") as server:
        wrong = OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        right = OpenAI(base_url=f"{server.url}/v1", api_key="right", max_retries=0)
        assert right.completions.create(model=MODEL, prompt="Hi", max_tokens=2).usage.completion_tokens == 2
        with pytest.raises(openai.APIStatusError) as caught:
            right.completions.create(model=MODEL, prompt="long " * 5000, max_tokens=2)
        assert caught.value.status_code == 413
