"""/v1/completions and /v1/chat/completions through the official client: streamed or not, the same answer."""

from __future__ import annotations

import itertools
import json

import openai
import pytest

from tests.serving.api.conftest import Server

TEXT = "The quick brown fox jumps over the lazy dog. Zażółć gęślą jaźń 🦊🚀."


def say(client: openai.OpenAI, text: str, **fields: object) -> openai.types.chat.ChatCompletion:
    return client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": text}], **fields)  # type: ignore[call-overload,no-any-return]


def test_chat_answers_with_text_and_usage(client: openai.OpenAI) -> None:
    answer = say(client, TEXT)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 16


def test_streamed_chat_is_the_same_text_in_whole_characters(client: openai.OpenAI) -> None:
    chunks = list(say(client, TEXT, stream=True, stream_options={"include_usage": True}))  # type: ignore[call-overload]
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == TEXT
    assert all("\ufffd" not in piece for piece in pieces)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_plain_completion_is_the_same_streamed_or_not(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="smollm2", prompt=TEXT, max_tokens=100)
    assert whole.choices[0].text == TEXT and whole.choices[0].finish_reason == "stop"
    streamed = client.completions.create(model="smollm2", prompt=TEXT, max_tokens=100, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == TEXT


def test_plain_completion_defaults_to_sixteen_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="smollm2", prompt=TEXT, extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [None, "dog"])
def test_token_ids_are_told_to_who_wants_them(server: Server, stream: bool, stop: str | None) -> None:
    """All tokens that were made, those too whose text is held back or cut."""
    body = {"prompt": [TEXT, "and more of it"], "max_tokens": 50, "stream": stream, "stop": stop}
    with server.http() as http:
        text = http.post("/v1/completions", json=body | {"return_token_ids": True}).text
        wanted = http.post("/tokenize", json={"prompt": TEXT}).json()["tokens"]
        assert "token_ids" not in http.post("/v1/completions", json=body).text
    found: dict[int, list[int]] = {0: [], 1: []}
    events = [line[6:] for line in text.splitlines() if line.startswith("data: {")] if stream else [text]
    for choice in (choice for event in events for choice in json.loads(event)["choices"]):
        found[choice["index"]] += choice["token_ids"]
    assert found[0][: len(wanted)] == wanted[: len(found[0])]
    assert len(found[0]) >= (len(wanted) if stop is None else 9)
    assert found[1]


@pytest.mark.parametrize("stream", [False, True])
def test_many_prompts_and_n_give_one_choice_each_in_order(client: openai.OpenAI, stream: bool) -> None:
    prompts = ["first one", "second", "the third of them"]
    answer = client.completions.create(model="smollm2", prompt=prompts, n=2, max_tokens=50, stream=stream)
    if stream:
        texts = [""] * 6
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        texts = [choice.text for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == list(range(6))
    assert texts == [prompt for prompt in prompts for _ in range(2)]


def test_n_counts_the_prompt_once_and_every_answer(client: openai.OpenAI) -> None:
    one = say(client, TEXT).usage
    three = say(client, TEXT, n=3)
    assert one is not None and three.usage is not None
    assert [choice.message.content for choice in three.choices] == [TEXT] * 3
    assert three.usage.prompt_tokens == one.prompt_tokens
    assert three.usage.completion_tokens == 3 * one.completion_tokens


def test_each_of_n_answers_has_a_seed_of_its_own(server: Server, client: openai.OpenAI) -> None:
    answer = client.completions.create(model="smollm2", prompt="x", n=3, seed=7)
    seeds = [line["params"]["seed"] for line in server.wait_for("submit") if line["id"].startswith(answer.id)]
    assert seeds[0] == 7 and len(set(seeds)) == 3


def test_tokens_and_echo(client: openai.OpenAI, server: Server) -> None:
    tokens = server.http().post("/tokenize", json={"prompt": "one two three"}).json()["tokens"]
    for prompt in (tokens, [tokens]):
        answer = client.completions.create(model="smollm2", prompt=prompt, echo=True, max_tokens=10)
        assert answer.choices[0].text == "one two three" * 2
    streamed = client.completions.create(model="smollm2", prompt="one two three", echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "one two three" * 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it_and_stops_the_engine(
    client: openai.OpenAI, server: Server, stream: bool
) -> None:
    text = "alpha beta gamma delta"
    answer = say(client, text, stop=["mma de", "never"], stream=stream, extra_body={"ignore_eos": True})
    if stream:
        chunks = list(answer)  # type: ignore[arg-type]
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        content, reason, id = "".join(pieces), chunks[-1].choices[0].finish_reason, chunks[0].id
    else:
        content, reason, id = answer.choices[0].message.content, answer.choices[0].finish_reason, answer.id
    assert content == "alpha beta ga" and reason == "stop"
    server.wait_for("cancel", id=f"{id}-0")


def test_a_stop_string_can_be_kept(client: openai.OpenAI) -> None:
    answer = say(client, "alpha beta gamma", stop="bet", extra_body={"include_stop_str_in_output": True})
    assert answer.choices[0].message.content == "alpha bet"


def test_the_beginning_of_a_stop_string_comes_out_when_the_text_ends(client: openai.OpenAI) -> None:
    assert say(client, "alpha be", stop="beta").choices[0].message.content == "alpha be"


def test_a_stop_token_ends_the_text(client: openai.OpenAI, server: Server) -> None:
    tokens = server.http().post("/tokenize", json={"prompt": "alpha beta gamma"}).json()["tokens"]
    answer = client.completions.create(
        model="smollm2", prompt=tokens, max_tokens=50, extra_body={"stop_token_ids": [tokens[2]], "ignore_eos": True}
    )
    assert answer.usage is not None and answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_spell_the_text(client: openai.OpenAI, stream: bool) -> None:
    answer = say(client, "alpha beta", logprobs=True, top_logprobs=2, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]  # type: ignore[attr-defined]
    entries = list(itertools.chain.from_iterable(choice.logprobs.content for choice in choices if choice.logprobs))
    assert b"".join(bytes(entry.bytes) for entry in entries) == b"alpha beta"
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in entries)


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs_have_offsets_into_the_text(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(model="smollm2", prompt="alpha beta", logprobs=1, stream=stream)
    parts = [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
    tokens = [token for part in parts for token in part.tokens]
    offsets = [offset for part in parts for offset in part.text_offset]
    assert "".join(tokens) == "alpha beta"
    assert all("alpha beta".startswith(token, offset) for token, offset in zip(tokens, offsets, strict=True))
    assert all(len(top) == 2 for part in parts for top in part.top_logprobs)  # the chosen one and one more


def test_sampling_fields_reach_the_engine(client: openai.OpenAI, server: Server) -> None:
    answer = client.completions.create(
        model="smollm2", prompt="x", max_tokens=9, temperature=0.3, top_p=0.8, presence_penalty=0.1,
        frequency_penalty=0.2, seed=11, logit_bias={"5": -100, "6": 1.5}, user="me",
        extra_body={"top_k": 4, "min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 3, "priority": -2},
    )  # fmt: skip
    (line,) = [line for line in server.engine_log("submit") if line["id"].startswith(answer.id)]
    expected = {
        "temperature": 0.3, "top_p": 0.8, "presence_penalty": 0.1, "frequency_penalty": 0.2, "seed": 11, "top_k": 4,
        "min_p": 0.05, "repetition_penalty": 1.1, "min_tokens": 3, "max_tokens": 9, "logit_bias": {"5": -100, "6": 1.5},
    }  # fmt: skip
    assert expected.items() <= line["params"].items() and line["priority"] == -2


def test_response_format_becomes_a_grammar(client: openai.OpenAI, server: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    named = {"name": "thing", "schema": schema}
    answer = say(client, "x", response_format={"type": "json_schema", "json_schema": named})
    other = say(client, "x", response_format={"type": "json_object"})
    grammars = {line["id"]: line["params"]["grammar"] for line in server.engine_log("submit")}
    assert json.loads(grammars[f"{answer.id}-0"]["source"]) == schema
    assert grammars[f"{other.id}-0"]["kind"] == "json_object"


def test_max_tokens_fills_the_context_when_omitted(client: openai.OpenAI, server: Server) -> None:
    answer = say(client, "round and round ", extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.total_tokens == 1024 and answer.choices[0].finish_reason == "length"
    assert say(client, TEXT, max_completion_tokens=3, max_tokens=9).choices[0].finish_reason == "length"
