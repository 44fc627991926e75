"""What clients get wrong: each answer has the right status, OpenAI's shape and a message that says what to do."""

from __future__ import annotations

import json
import socket
import string
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from kvarn.serving.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from tests.serving.api.conftest import Server

JSON = {"content-type": "application/json"}
CHAT = "/v1/chat/completions"
NO_SCHEMA = {"type": "json_schema"}
MESSAGES = [{"role": "user", "content": "x"}]


def post(server: Server, path: str, body: object) -> tuple[int, dict[str, Any]]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with server.http() as http:
        answer = http.post(path, content=content, headers=JSON)
    error = answer.json().get("error", {})
    if answer.status_code >= 400:
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return answer.status_code, error


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": MESSAGES, "temperature": "hot"}, "temperature"),
        (CHAT, {"messages": MESSAGES, "temperature": 2.5}, "temperature"),
        (CHAT, {"messages": MESSAGES, "temperature": True}, "temperature"),
        (CHAT, {"messages": MESSAGES, "n": 0}, "n"),
        (CHAT, {"messages": MESSAGES, "seed": 2**64}, "seed"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        (CHAT, {"messages": MESSAGES, "logit_bias": {"99999": 1}}, "logit_bias"),
        (CHAT, {"messages": MESSAGES, "logit_bias": {"one": 1}}, "logit_bias.one"),
        (CHAT, {"messages": MESSAGES, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        (CHAT, {"messages": MESSAGES, "response_format": NO_SCHEMA}, "response_format.json_schema.schema"),
        (CHAT, {"messages": MESSAGES, "response_format": {"type": "yaml"}}, "response_format.type"),
        ("/v1/completions", {"prompt": 5}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": [-1]}, "prompt.0"),
        ("/v1/completions", {"prompt": [49152]}, "prompt"),
        ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
        ("/v1/completions", {"prompt": "x", "best_of": 2}, "best_of"),
        ("/v1/completions", {"prompt": "x", "echo": True, "logprobs": 1}, "echo"),
        ("/v1/responses", {"input": 5}, "input"),
        ("/tokenize", {}, "prompt"),
        ("/detokenize", {"tokens": ["x"]}, "tokens.0"),
    ],
)  # fmt: skip
def test_impossible_values_name_their_field(server: Server, path: str, body: object, param: str) -> None:
    status, error = post(server, path, body)
    assert (status, error["param"]) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"messages": NaN}',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "seed": 1.5}',
    ],
)
def test_malformed_bodies_are_client_errors(server: Server, body: bytes) -> None:
    assert post(server, "/v1/completions", body)[0] == 400


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (CompletionRequest, {"prompt": [True] * 5000}),
        (CompletionRequest, {"prompt": [[None] * 5000]}),
        (CompletionRequest, {"prompt": "x", "stop": [1] * 5000, "stop_token_ids": ["x"] * 5000}),
        (ChatRequest, {"messages": [1] * 5000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * 5000, "tool_calls": [1] * 5000}]}),
        (ChatRequest, {"messages": MESSAGES, "tools": [1] * 5000}),
        (ResponsesRequest, {"input": [1] * 5000, "tools": [1] * 5000}),
        (ResponsesRequest, {"input": [{"role": "user", "content": [1] * 5000, "output": [1] * 5000}]}),
        (TokenizeRequest, {"messages": [1] * 5000, "tools": [1] * 5000}),
        (DetokenizeRequest, {"tokens": ["x"] * 5000}),
    ],
)
def test_a_list_of_wrong_items_costs_one_error_and_not_one_an_item(
    model: type[BaseModel], body: dict[str, object]
) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(json.dumps(body))
    assert caught.value.error_count() <= 6


def test_an_object_of_many_wrong_entries_is_refused_with_their_number(server: Server) -> None:
    status, error = post(server, CHAT, {"messages": MESSAGES, "logit_bias": {f"x{i}": 1 for i in range(5000)}})
    assert (status, error["code"]) == (400, "invalid_value") and "5000" in error["message"]


def test_odd_text_is_served(server: Server) -> None:
    for text in ("\0", "a\0b", "\u202e\ufeff", "\U0010ffff", " \n\t", "<|im_start|>system\n<|im_end|>"):
        assert post(server, CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 3})[0] == 200


def test_unknown_fields_are_ignored(server: Server) -> None:
    assert (
        post(server, CHAT, {"messages": MESSAGES, "store": True, "reasoning_effort": "low", "x": {"y": [1]}})[0] == 200
    )


def test_a_prompt_longer_than_the_context_states_both_lengths(server: Server) -> None:
    status, error = post(server, CHAT, {"messages": [{"role": "user", "content": "word " * 2000}]})
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert "20" in error["message"] and "1024" in error["message"]
    status, error = post(server, "/v1/completions", {"prompt": [5] * 1000, "max_tokens": 100})
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "max_tokens")
    assert "1100" in error["message"] and "1024" in error["message"] and "24" in error["message"]


def test_an_unknown_model_is_not_found(server: Server) -> None:
    status, error = post(server, CHAT, {"model": "gpt-9", "messages": MESSAGES})
    assert (status, error["code"]) == (404, "model_not_found") and "smollm2" in error["message"]
    with server.http() as http:
        assert http.get("/v1/models/gpt-9").status_code == 404
        assert http.get("/v1/models/smollm2").json()["id"] == "smollm2"
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["smollm2"]


@pytest.mark.parametrize("stream", [True, False])
def test_what_the_engine_refuses_is_a_client_error_streamed_or_not(server: Server, stream: bool) -> None:
    schema = {"name": "x", "schema": {"title": "impossible"}}
    body = {"messages": MESSAGES, "stream": stream, "response_format": {"type": "json_schema", "json_schema": schema}}
    status, error = post(server, CHAT, body)
    assert (status, error["param"]) == (400, "response_format")


def test_wrong_urls_methods_and_types_have_the_same_shape(server: Server) -> None:
    with server.http() as http:
        for answer, status in (
            (http.get("/v1/nothing"), 404),
            (http.get(CHAT), 405),
            (http.post(CHAT, content=b"x", headers={"content-type": "text/plain"}), 415),
            (http.post("/v1/completions", data={"prompt": "x"}), 415),
        ):
            assert answer.status_code == status
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_tokenize_and_back(server: Server) -> None:
    with server.http() as http:
        text = "Zażółć gęślą jaźń 🦊"
        answer = http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) and answer["max_model_len"] == 1024
        assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
        chat = http.post("/tokenize", json={"messages": MESSAGES}).json()
        assert chat["count"] > answer["count"] - len(answer["tokens"])


def test_a_body_is_refused_while_it_still_comes(start: Any) -> None:
    """The server answers 413 before a body of no declared length has ended."""
    with start(max_body_bytes=10_000) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(
                f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                "Transfer-Encoding: chunked\r\n\r\n".encode()
            )
            connection.sendall(b"4e20\r\n" + b" " * 20_000 + b"\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 413")
        status, error = post(server, CHAT, b" " * 10_001)
        assert (status, error["code"]) == (413, "body_too_large")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(string.printable, max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab$", max_size=3), inner, max_size=3),
    max_leaves=8,
)
PATHS = (CHAT, "/v1/completions", "/v1/responses")
FIELDS = (
    *("messages", "prompt", "input", "tools", "tool_choice", "stop", "n", "logprobs", "response_format", "logit_bias"),
    *("max_tokens", "stream", "stream_options", "seed", "top_k", "text", "instructions", "chat_template_kwargs"),
    *("priority", "prompt_cache_key", "kv_hints", "nvext"),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4),
    st.sampled_from(PATHS),
)
def test_no_json_makes_the_server_fail(server: Server, fields: dict[str, Any], path: str) -> None:
    """Whatever the body: an answer or a client error."""
    valid = {"messages": MESSAGES, "prompt": "x", "input": "x", "max_tokens": 4}
    content = json.dumps(valid | fields).encode()
    with server.http() as http:
        assert http.post(path, content=content, headers=JSON).status_code in (200, 400)
