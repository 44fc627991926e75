"""Segments and rounds over HTTP: what reaches the engine, what is refused, and what clients are told."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from kvarn.serving.api.answer_schemas import Round, RoundTotals
from kvarn.serving.api.messages import EngineStats
from kvarn.serving.api.metrics import Metrics
from kvarn.serving.rounds_report import RoundFacts, RoundReport
from kvarn.simulation.traces import load_trace
from tests.serving.api.conftest import Server
from tests.serving.api.test_bad_input import CHAT, MESSAGES, post

PLAIN = "/v1/completions"
TEXT = "What the others have said: it rains."
PARTS = [{"kind": "private", "content": "I am one of many. "}, {"kind": "shared", "content": TEXT, "id": "news"}]
ROUND = {"id": "r1", "size": 2, "agent": "a"}


def submitted(server: Server) -> dict[str, Any]:
    """The request that the engine was given last."""
    return server.engine_log("submit")[-1]


def shared_tokens(submit: dict[str, Any]) -> list[list[int]]:
    found, place = [], 0
    for segment in submit["segments"]:
        if segment["kind"] == "shared":
            found.append(submit["prompt"][place : place + segment["tokens"]])
        place += segment["tokens"]
    return found


def send(server: Server, path: str, **body: Any) -> dict[str, Any]:
    with server.http() as http:
        answer = http.post(path, json={"max_tokens": 3} | body)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def tokens_of(server: Server, text: str) -> list[int]:
    with server.http() as http:
        tokens: list[int] = http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    return tokens


def test_segments_in_place_of_a_prompt_reach_the_engine(server: Server) -> None:
    task = {"kind": "task", "content": tokens_of(server, " Shall we go?")}
    answer = send(server, PLAIN, segments=[*PARTS, task, {"kind": "task", "content": ""}], round=ROUND, echo=True)
    told = submitted(server)
    wanted = tokens_of(server, TEXT)
    assert shared_tokens(told) == [wanted]
    assert [(each["kind"], each.get("id", "")) for each in told["segments"]] == [
        ("private", ""), ("shared", "news"), ("task", "")
    ]  # fmt: skip
    assert told["round"] == ROUND
    assert answer["choices"][0]["text"].startswith("I am one of many. " + TEXT + " Shall we go?")
    assert answer["usage"]["prompt_tokens"] == len(told["prompt"])
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 16, "reused_tokens": len(wanted)}


@pytest.mark.parametrize("stream", [False, True])
def test_a_marked_text_of_a_conversation_is_the_same_segment(server: Server, stream: bool) -> None:
    part = {"type": "text", "text": TEXT, "segment": "shared", "segment_id": "news"}
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    client, round = server.openai(), {"round": {"id": "r2", "size": 3}}
    say = client.chat.completions.create
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    answer = say(model="smollm2", messages=[{"role": "user", "content": [part]}], stream=stream, **usage)
    first, told = submitted(server), [*answer][-1].usage if stream else answer.usage
    marked = {"role": "user", "content": TEXT + "\n", "segment": "shared"}
    say(model="smollm2", messages=[*history, marked, *MESSAGES], extra_body=round)
    second = submitted(server)
    assert shared_tokens(first) == shared_tokens(second) == [tokens_of(server, TEXT)]
    assert told.prompt_tokens_details.reused_tokens == len(tokens_of(server, TEXT))
    assert first["round"] is None and second["round"] == round["round"]
    assert [each["kind"] for each in second["segments"]] == ["private", "shared", "task"]


def test_responses_belong_to_rounds_too(server: Server) -> None:
    part = {"type": "input_text", "text": TEXT, "segment": "shared"}
    item = {"role": "user", "content": [part, {"type": "input_text", "text": "Well?"}]}
    with server.http() as http:
        answer = http.post("/v1/responses", json={"input": [item], "round": ROUND}).json()
    assert submitted(server)["round"] == ROUND
    assert answer["usage"]["input_tokens_details"]["reused_tokens"] == len(shared_tokens(submitted(server))[0])


def test_who_says_nothing_of_segments_gets_an_ordinary_answer(server: Server) -> None:
    answer = send(server, CHAT, messages=MESSAGES)
    told = submitted(server)
    assert told["segments"] == [] and told["round"] is None
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


def test_a_separator_is_for_servers_that_have_one(start: Any, server: Server) -> None:
    text = f"I am one.<|sep|>{TEXT}<|sep|>Well?"
    send(server, PLAIN, prompt=text)
    assert submitted(server)["segments"] == []
    with start(segment_separator="<|sep|>") as other:
        answer = send(other, PLAIN, prompt=[text, "no separator"], echo=True)
        cut, whole = other.engine_log("submit")[-2:]
        assert [each["kind"] for each in cut["segments"]] == ["private", "shared", "task"]
        assert shared_tokens(cut) == [tokens_of(server, TEXT)] and whole["segments"] == []
        assert answer["choices"][0]["text"].startswith(f"I am one.{TEXT}Well?")


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (PLAIN, {}, "prompt", "segments"),
        (PLAIN, {"prompt": "x", "segments": PARTS}, "segments", "one of the two"),
        (PLAIN, {"segments": []}, "segments", "empty"),
        (PLAIN, {"segments": [{"kind": "shared", "content": ""}]}, "segments", "empty"),
        (PLAIN, {"segments": [{"kind": "public", "content": "x"}]}, "segments.0.kind", "'shared'"),
        (PLAIN, {"segments": [{"kind": "shared"}]}, "segments.0.content", "required"),
        (PLAIN, {"segments": [{"kind": "shared", "content": ["x"]}]}, "segments.0.content.0", "integer"),
        (PLAIN, {"segments": [{"kind": "shared", "content": [99999]}]}, "segments", "vocabulary"),
        (PLAIN, {"segments": [{"kind": "shared", "content": "x", "id": "y" * 201}]}, "segments.0.id", "200"),
        (PLAIN, {"segments": [{"kind": "task", "content": [5] * 2000}]}, "segments", "context"),
        (PLAIN, {"segments": PARTS, "round": {"id": "r", "size": 0}}, "round.size", "1"),
        (PLAIN, {"segments": PARTS, "round": {"id": "r", "size": 1025}}, "round.size", "1024"),
        (PLAIN, {"segments": PARTS, "round": {"id": "r" * 201, "size": 2}}, "round.id", "200"),
        (PLAIN, {"segments": PARTS, "round": {"id": "", "size": 2}}, "round.id", "1"),
        (PLAIN, {"segments": PARTS, "round": {"id": "r", "size": 2, "agent": "a" * 201}}, "round.agent", "200"),
        (PLAIN, {"segments": PARTS, "round": {"size": 2}}, "round.id", "required"),
        (PLAIN, {"segments": PARTS, "round": ROUND, "n": 2}, "n", "one answer"),
        (PLAIN, {"segments": PARTS, "round": ROUND, "best_of": 2}, "best_of", "n"),
        (PLAIN, {"prompt": ["x", "y"], "round": ROUND}, "prompt", "one prompt"),
        (CHAT, {"messages": MESSAGES, "round": ROUND, "n": 2}, "n", "one answer"),
        (CHAT, {"messages": [MESSAGES[0] | {"segment": "all"}]}, "messages.0.segment", "'shared'"),
        ("/v1/responses", {"input": "x", "round": {"id": "r", "size": -1}}, "round.size", "1"),
    ],
)
def test_impossible_segments_and_rounds_name_their_field(
    server: Server, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    status, error = post(server, path, body)
    assert (status, error["param"]) == (400, param)
    assert words in error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_that_is_twice_in_a_round_is_told_of_the_conflict(server: Server, stream: bool) -> None:
    body = {"messages": MESSAGES, "round": ROUND | {"agent": "twice"}, "stream": stream}
    status, error = post(server, CHAT, body)
    assert (status, error["param"], error["code"]) == (409, "round.agent", "conflict")
    assert "'r1'" in error["message"]


def test_recorded_segments_and_rounds_can_be_replayed(start: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with start(record=str(trace)) as server:
        for number, agent in enumerate("ab"):
            own = {"kind": "private", "content": f"I am {agent}. " * (3 + number)}
            send(server, PLAIN, segments=[own, PARTS[1]], round=ROUND | {"agent": agent})
        send(server, PLAIN, prompt="x")
        wanted = shared_tokens(server.engine_log("submit")[0])[0]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [line.get("reused_tokens") for line in lines] == [len(wanted), len(wanted), None]
    assert TEXT not in trace.read_text() and not {"segments", "round"} & lines[2].keys()
    specs = load_trace(trace, "kvarn")
    assert [spec.round and spec.round.agent for spec in specs] == ["a", "b", None]
    assert specs[0].segments[1] == specs[1].segments[1] and specs[0].segments[1].segment.id == "news"
    assert specs[0].segments[1].content and specs[0].prompt_tokens != specs[1].prompt_tokens


# ---- what is told of rounds ------------------------------------------------------------------------------


def test_the_last_rounds_are_told_with_their_totals(start: Any) -> None:
    with start() as server, server.http() as http:
        none = http.get("/v1/rounds", params={"limit": 1}).json()
        assert none["data"] == [] and none["totals"]["collected_rounds"] == 0
        for number in range(3):
            send(server, PLAIN, segments=PARTS, round={"id": f"r{number}", "size": 2})
        told = http.get("/v1/rounds", params={"limit": 2}).json()
        reused = len(tokens_of(server, TEXT))
        assert [each["id"] for each in told["data"]] == ["r2", "r1"]
        assert told["data"][0] == {
            "id": "r2", "members": 2, "arrived": 1, "waited_seconds": 0.25, "mode": "collective", "segments": 1,
            "reused_tokens": reused, "refreshed_tokens": 2,
        }  # fmt: skip
        assert told["totals"]["collected_rounds"] == 3 and told["totals"]["reused_tokens"] == 3 * reused
        assert server.metric("kvarn_rounds_total") == 3 and server.metric("kvarn_segment_bytes") == 4096
        assert TEXT not in http.get("/v1/rounds").text
        assert http.get("/v1/rounds?limit=0").json()["error"]["param"] == "limit"


def test_counters_of_rounds_go_on_when_another_engine_counts_from_zero() -> None:
    metrics = Metrics()
    metrics.engine_stats(EngineStats(rounds=RoundFacts(collected_rounds=5, segment_bytes=7)))
    metrics.engine_stats(EngineStats(rounds=RoundFacts(collected_rounds=6, segment_bytes=7)))
    metrics.engine_is_up(False)
    assert "kvarn_segment_bytes 0.0" in metrics.render().decode()
    metrics.engine_stats(EngineStats(rounds=RoundFacts(collected_rounds=3)))
    assert "kvarn_rounds_total 9.0" in metrics.render().decode()


def test_every_fact_of_rounds_is_told() -> None:
    assert set(RoundTotals.model_fields) == set(RoundFacts.__struct_fields__)
    assert set(Round.model_fields) == set(RoundReport.__struct_fields__)
