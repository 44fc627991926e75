"""Agents over HTTP: what becomes of hints, events of tool calls, and what plain clients say without knowing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.api.calls import CallBook
from kvarn.serving.api.hint_schemas import HintFields
from kvarn.serving.api.hints import LONGEST_SECONDS, LONGEST_TEXT, MOST_AFTER, Hints, read_hints
from kvarn.serving.api.messages import AgentStats, EngineStats
from kvarn.serving.api.metrics import Metrics
from tests.conftest import wait_until
from tests.serving.api.conftest import Server, running
from tests.serving.api.test_tools import CALLS, TOOLS

EVENTS = "/v1/agents/events"


# ---- hints -----------------------------------------------------------------------------------------------


def hints_of(fields: dict[str, Any], headers: dict[str, str] | None = None, policy: str = "agentic") -> Hints:
    """As the server reads them: through the body's schema."""
    return read_hints(HintFields.model_validate_json(json.dumps(fields)).hint_fields, headers or {}, policy)


def outcomes(hints: Hints) -> dict[str, str]:
    return {each.hint: each.outcome for each in hints.outcomes}


def reason(hints: Hints, hint: str) -> str:
    return next(each.reason for each in hints.outcomes if each.hint == hint)


def test_facts_of_an_agent_reach_the_engine_within_bounds() -> None:
    agent = {"program": "p", "importance": 11, "tool_seconds": 1e9, "depth": -3, "after": ["a", "b"], "critical": True}
    hints = hints_of({"kv_hints": {"agent": agent, "message_id": "m1"}})
    assert hints.agent == AgentHints(
        program="p", importance=10, tool_seconds=LONGEST_SECONDS, depth=0, after=("a", "b"), critical=True
    )
    clipped = {name for name, outcome in outcomes(hints).items() if outcome == "clipped"}
    assert clipped == {f"kv_hints.agent.{name}" for name in ("importance", "tool_seconds", "depth")}
    assert reason(hints, "kv_hints.agent.importance") == "11 is above 10"
    assert hints.answer()["kv_hints"]["message_id"] == "m1"


def test_long_texts_and_lists_are_cut() -> None:
    hints = hints_of({"kv_hints": {"agent": {"tool": "x" * 300, "after": ["y" * 300] * 100}}})
    assert hints.agent is not None
    assert len(hints.agent.tool) == LONGEST_TEXT
    assert [len(node) for node in hints.agent.after] == [LONGEST_TEXT] * MOST_AFTER
    assert set(outcomes(hints).values()) == {"clipped"}


def test_unknown_fields_are_told_one_by_one_up_to_a_number() -> None:
    hints = hints_of({"kv_hints": {"agent": {"colour": 1}, "mood": 2, "actions": [{"verb": "retain", "range": [1]}]}})
    ignored = {"kv_hints.agent.colour", "kv_hints.mood", "kv_hints.actions.0.range"}
    assert {name for name, outcome in outcomes(hints).items() if outcome == "ignored"} == ignored
    many = hints_of({"kv_hints": {f"x{i}": i for i in range(10_000)}})
    assert len(many.outcomes) < 50 and "9968" in reason(many, "kv_hints")


@pytest.mark.parametrize(
    ("actions", "seconds", "outcome"),
    [
        ([{"verb": "retain", "seconds": 30}], 30, "accepted"),
        ([{"verb": "retain"}], 300, "accepted"),
        ([{"verb": "retain", "seconds": 1e6}], 3600, "clipped"),
        ([{"verb": "pin", "seconds": 60}], 60, "clipped"),
        ([{"verb": "demote"}], 0, "accepted"),
        ([{"verb": "prefetch"}], -1, "ignored"),
        ([{"verb": "share"}], -1, "ignored"),
        ([{"verb": "explode"}], -1, "ignored"),
    ],
)
def test_actions(actions: list[dict[str, Any]], seconds: float, outcome: str) -> None:
    hints = hints_of({"kv_hints": {"actions": actions}})
    assert hints.retain_seconds == seconds
    assert outcomes(hints) == {"kv_hints.actions.0": outcome}


def test_another_protocol_version_is_ignored_whole() -> None:
    hints = hints_of({"kv_hints": {"protocol_version": 2, "agent": {"program": "p"}}})
    assert hints.agent is None and outcomes(hints) == {"kv_hints": "ignored"}


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"x-session-id": "s"}, AgentHints(program="s")),
        ({"session-id": "s"}, AgentHints(program="s")),
        ({"thread-id": "t", "x-codex-parent-thread-id": "p"}, AgentHints(program="p", node="t")),
        ({"x-dynamo-session-id": "s", "x-dynamo-parent-session-id": "p"}, AgentHints(program="p", node="s")),
        ({"x-session-id": "s", "x-parent-session-id": "p"}, AgentHints(program="p", node="s")),
        (
            {"x-claude-code-session-id": "s", "x-claude-code-agent-id": "a", "x-claude-code-parent-agent-id": "b"},
            AgentHints(program="s", node="a", after=("b",)),
        ),
        ({"x-session-affinity": "s"}, AgentHints(program="s")),
        ({"x-grok-conv-id": "s"}, AgentHints(program="s")),
        ({"x-multi-turn-session-id": "s"}, AgentHints(program="s")),
    ],
)
def test_sessions_name_programs(headers: dict[str, str], expected: AgentHints) -> None:
    hints = hints_of({}, headers)
    assert hints.agent == expected
    assert outcomes(hints) == dict.fromkeys(headers, "accepted")


def test_the_envelope_counts_before_headers_and_both_before_the_cache_key() -> None:
    fields = {"prompt_cache_key": "k", "kv_hints": {"agent": {"program": "p"}}}
    hints = hints_of(fields, {"x-session-id": "s"})
    assert hints.agent == AgentHints(program="p")
    assert outcomes(hints) == {
        "kv_hints.agent.program": "accepted", "x-session-id": "ignored", "prompt_cache_key": "ignored"
    }  # fmt: skip
    same = hints_of(fields | {"prompt_cache_key": "p"}, {"x-session-id": "p"})
    assert set(outcomes(same).values()) == {"accepted"}
    assert hints_of({"prompt_cache_key": "k"}).agent == AgentHints(program="k")
    assert hints_of({}, {"x-dynamo-session-final": "true", "x-dynamo-session-id": "s"}).retain_seconds == 0


def test_priorities_have_one_sign_inside() -> None:
    assert hints_of({"priority": 3}).priority == 3
    theirs = {"nvext": {"agent_hints": {"priority": 7, "osl": 100}}}
    assert hints_of(theirs).priority == -7
    assert outcomes(hints_of(theirs))["nvext.agent_hints.osl"] == "ignored"
    both = hints_of({"priority": 3} | theirs)
    assert both.priority == 3 and outcomes(both)["nvext.agent_hints.priority"] == "ignored"
    assert hints_of({"nvext": {"agent_hints": {"priority": 10**30}}}).priority == -(2**31) + 1


def test_other_policies_ignore_all_but_the_priority() -> None:
    hints = hints_of({"priority": 1, "kv_hints": {"agent": {"program": "p"}}}, {"x-session-id": "s"}, "fcfs")
    assert outcomes(hints) == {
        "kv_hints.agent.program": "ignored", "x-session-id": "ignored", "priority": "accepted"
    }  # fmt: skip
    assert "fcfs" in reason(hints, "kv_hints.agent.program")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
texts, numbers = st.text(max_size=300), st.integers() | st.floats(allow_nan=False, allow_infinity=False)
agents = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("program", "agent", "node", "join", "tool"), texts)
    | {name: st.integers() for name in ("depth", "fan_in", "fan_out", "importance")}
    | dict.fromkeys(("remaining_seconds", "total_seconds", "tool_seconds"), numbers)
    | {"critical": st.booleans(), "after": st.lists(texts, max_size=80)},
)


@settings(max_examples=100, deadline=None)
@given(agents, st.dictionaries(st.text(max_size=5), json_values, max_size=3), st.dictionaries(texts, texts, max_size=2))
def test_every_hint_has_one_outcome_and_all_stays_within_bounds(
    agent: dict[str, Any], more: dict[str, Any], headers: dict[str, str]
) -> None:
    """Law: each hint is answered once, with a reason where it is not accepted, and no fact is out of bounds."""
    hints = read_hints({"kv_hints": {"agent": more | agent}}, headers, "agentic")
    said = [each.hint for each in hints.outcomes]
    assert sorted(said) == sorted(f"kv_hints.agent.{name}" for name in more | agent)
    assert all(bool(each.reason) == (each.outcome != "accepted") for each in hints.outcomes)
    facts = hints.agent or AgentHints()
    assert 0 <= facts.importance <= 10 and facts.tool_seconds <= LONGEST_SECONDS and len(facts.after) <= MOST_AFTER
    assert all(ord(letter) in range(32, 127) for letter in "".join(hints.headers().values()))


def test_wrong_types_are_refused_by_name(server: Server) -> None:
    cases = {
        "kv_hints.agent.importance": {"kv_hints": {"agent": {"importance": "much"}}},
        "kv_hints.agent.after.0": {"kv_hints": {"agent": {"after": [1]}}},
        "kv_hints.actions.0.verb": {"kv_hints": {"actions": [{}]}},
        "prompt_cache_key": {"prompt_cache_key": 5},
        "nvext.agent_hints.priority": {"nvext": {"agent_hints": {"priority": "high"}}},
        "priority": {"priority": 2**31},
    }
    bodies = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/completions": {"prompt": "x"},
        "/v1/responses": {"input": "x"},
    }
    with server.http() as http:
        for path, body in bodies.items():
            for param, fields in cases.items():
                answer = http.post(path, json=body | fields)
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.fixture(scope="module")
def agentic() -> Any:
    """A server whose policy uses hints (the stand-in for the engine has none)."""
    with running(engine={"policy": "agentic"}) as shared:
        yield shared


GIVEN = {"kv_hints": {"message_id": "m", "agent": {"program": "p", "importance": 99}}, "priority": 2}
ANSWERED = {
    "protocol_version": 1,
    "message_id": "m",
    "outcomes": [
        {"hint": "kv_hints.agent.program", "outcome": "accepted"},
        {"hint": "kv_hints.agent.importance", "outcome": "clipped", "reason": "99 is above 10"},
        {"hint": "priority", "outcome": "accepted"},
    ],
}
HEADER = "program=accepted, importance=clipped, priority=accepted"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
    ],
)
def test_each_endpoint_answers_hints_and_hands_them_on(agentic: Server, path: str, body: dict[str, Any]) -> None:
    with agentic.http() as http:
        answer = http.post(path, json=body | GIVEN)
        assert answer.json()["kv_hints"] == ANSWERED and answer.headers["x-kv-hints"] == HEADER
        (heard,) = [line for line in agentic.engine_log("submit") if line["id"] == f"{answer.json()['id']}-0"]
        assert heard["agent"] == {"program": "p", "importance": 10}
        assert heard["priority"] == 2 and heard["may_call"] is True
        streamed = http.post(path, json=body | GIVEN | {"stream": True})
        assert streamed.headers["x-kv-hints"] == HEADER
        lines = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line.startswith("data: {")]
        first = json.loads(lines[0])
        assert first.get("response", first)["kv_hints"] == ANSWERED
        if path != "/v1/responses":  # there each object is the whole response
            assert sum("kv_hints" in line for line in lines) == 1
        plain = http.post(path, json=body)
        assert "kv_hints" not in plain.json() and "x-kv-hints" not in plain.headers


def test_under_another_policy_hints_are_answered_as_ignored(server: Server) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", json={"prompt": "x"}, headers={"X-Session-Id": "s"})
    (outcome,) = answer.json()["kv_hints"]["outcomes"]
    assert (outcome["hint"], outcome["outcome"]) == ("x-session-id", "ignored") and "fcfs" in outcome["reason"]


# ---- what plain clients say ------------------------------------------------------------------------------


def heard(server: Server, answer_id: str) -> list[dict[str, Any]]:
    """The events of one answer that the engine has been told of. Messages keep their order, so all that were sent
    before one that is answered count."""
    with server.http() as http:
        assert http.post(EVENTS, json={"type": "close", "request": "last"}).status_code == 404
    return [line for line in server.engine_log("tell") if line["request"] == f"{answer_id}-0"]


def submitted(server: Server, answer_id: str) -> dict[str, Any]:
    (line,) = [line for line in server.engine_log("submit") if line["id"] == f"{answer_id}-0"]
    return line


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_with_calls_begins_one_and_their_results_go_on_from_it(server: Server, stream: bool) -> None:
    client = server.openai()
    messages: list[Any] = [{"role": "user", "content": CALLS}]
    asked: dict[str, Any] = {"model": "smollm2", "tools": TOOLS}
    if stream:
        chunks = list(client.chat.completions.create(messages=messages, stream=True, **asked))
        id = chunks[0].id
        pieces = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or ()]
        ids = [piece.id for piece in pieces if piece.id]
    else:
        answer = client.chat.completions.create(messages=messages, **asked)
        id, ids = answer.id, [call.id for call in answer.choices[0].message.tool_calls or ()]
    (start,) = heard(server, id)
    assert (start["kind"], start["tool"], start["implicit"]) == ("CallStart", "weather,time", True)
    assert submitted(server, id)["may_call"] is True
    results = [{"role": "tool", "tool_call_id": call, "content": "4 degrees"} for call in ids]
    again = client.chat.completions.create(messages=messages + results, **asked)
    assert submitted(server, again.id)["continues"] == f"{id}-0"
    spoken = client.chat.completions.create(messages=[*messages, *results, *messages], **asked)
    assert submitted(server, spoken.id)["continues"] == ""  # the results are not the last word


def test_responses_with_calls_do_the_same(server: Server) -> None:
    client = server.openai()
    tools: Any = [{"type": "function"} | TOOLS[0]["function"]]  # type: ignore[dict-item]
    answer = client.responses.create(model="smollm2", input=CALLS, tools=tools)
    call = next(item for item in answer.output if item.type == "function_call")
    (start,) = heard(server, answer.id)
    assert start["tool"] == "weather,time"
    history: Any = [
        {"role": "user", "content": "x"},
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
    ]
    again = client.responses.create(model="smollm2", input=history, tools=tools)
    assert submitted(server, again.id)["continues"] == f"{answer.id}-0"


def test_a_recorded_call_can_be_followed(start: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    with start(record=str(trace)) as server:
        client = server.openai()
        messages: list[Any] = [{"role": "user", "content": CALLS}]
        hints = {"kv_hints": {"agent": {"program": "p", "agent": "coder", "node": "n"}}}
        answer = client.chat.completions.create(
            model="smollm2", messages=messages, tools=TOOLS, extra_body=hints  # type: ignore[arg-type]
        )  # fmt: skip
        (call, *_) = answer.choices[0].message.tool_calls or ()
        result = {"role": "tool", "tool_call_id": call.id, "content": "x"}
        client.chat.completions.create(model="smollm2", messages=[*messages, result])
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    first, second = [json.loads(line) for line in trace.read_text().splitlines()]
    assert (first["program"], first["agent"], first["node"]) == ("p", "coder", "n") and "continues" not in first
    assert second["continues"] == first["id"] == f"{answer.id}-0" and "program" not in second


def test_text_begins_no_call(server: Server) -> None:
    client = server.openai()
    answer = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "no call here"}], tools=TOOLS  # type: ignore[arg-type]
    )  # fmt: skip
    assert submitted(server, answer.id)["may_call"] is True and not heard(server, answer.id)
    plain = client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": CALLS}])
    assert submitted(server, plain.id)["may_call"] is False and not heard(server, plain.id)


def test_who_wants_nothing_kept_begins_no_call(server: Server) -> None:
    demote = {"kv_hints": {"actions": [{"verb": "demote"}]}}
    answer = server.openai().chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": CALLS}], tools=TOOLS, extra_body=demote  # type: ignore[arg-type]
    )  # fmt: skip
    assert answer.choices[0].finish_reason == "tool_calls"
    assert submitted(server, answer.id)["retain_seconds"] == 0 and not heard(server, answer.id)


def test_another_tenants_call_ids_are_unknown(start: Any) -> None:
    with start(api_keys=["a", "b"]) as server:
        messages: list[Any] = [{"role": "user", "content": CALLS}]
        answer = server.openai("a").chat.completions.create(model="smollm2", messages=messages, tools=TOOLS)
        call = answer.choices[0].message.tool_calls[0].id
        results = [*messages, {"role": "tool", "tool_call_id": call, "content": "x"}]
        theirs = server.openai("b").chat.completions.create(model="smollm2", messages=results)
        assert submitted(server, theirs.id)["continues"] == ""
        with server.http() as http:
            for request in (answer.id, call):
                event = {"type": "call_finish", "request": request}
                other = http.post(EVENTS, json=event, headers={"authorization": "Bearer b"})
                assert other.status_code == 404
                mine = http.post(EVENTS, json=event, headers={"authorization": "Bearer a"})
                assert mine.status_code == 200 and mine.json()["request"] == request
            assert http.post(EVENTS, json=event).status_code == 401


def test_the_book_forgets_a_tenants_oldest_ids_and_no_others() -> None:
    book = CallBook(most_ids=3)
    book.note_calls("b", ["kept"], "r0")
    for number in range(5):
        book.note_calls("a", [f"call{number}"], f"r{number}")
    assert [book.request_of("a", [f"call{number}"]) for number in range(5)] == ["", "", "r2", "r3", "r4"]
    assert book.request_of("b", ["kept"]) == "r0" and book.request_of("b", ["call4"]) == ""


# ---- events ----------------------------------------------------------------------------------------------


def an_answer(server: Server) -> str:
    """The id of an answer that ended with a call."""
    messages: list[Any] = [{"role": "user", "content": CALLS}]
    return server.openai().chat.completions.create(model="smollm2", messages=messages, tools=TOOLS).id  # type: ignore[arg-type]


def test_a_call_is_told_of_from_its_start_to_its_end_and_twice(server: Server) -> None:
    request = an_answer(server)
    with server.http() as http:
        start = {"type": "call_start", "request": request, "tool": "weather", "seconds": 4, "stages": ["a", "b"]}
        for _ in range(2):
            answer = http.post(EVENTS, json=start)
            assert answer.status_code == 200
            assert answer.json() == {
                "object": "agent.call", "request": request, "state": "calling", "expected_seconds": 4.0,
                "remaining_seconds": None, "elapsed_seconds": None, "deadline_seconds": None, "held_blocks": 3,
                    "closed": 0,
            }  # fmt: skip
        steps: list[dict[str, Any]] = [
            {"type": "call_progress", "stage": "b"},
            {"type": "call_progress", "fraction": 0.5},
            {"type": "call_finish", "seconds": 3.5},
            {"type": "close"},
        ]
        for step in steps:
            assert http.post(EVENTS, json=step | {"request": request}).status_code == 200
        assert http.post(EVENTS, json={"type": "close", "request": request}).status_code == 404
    kinds = [line["kind"] for line in heard(server, request)]
    assert kinds == [*["CallStart"] * 3, *["CallProgress"] * 2, "CallFinish", *["Close"] * 2]


@pytest.mark.parametrize(
    ("event", "status", "param"),
    [
        ({"type": "call_end", "request": "x"}, 400, "type"),
        ({"request": "x"}, 400, "type"),
        ({"type": "call_start"}, 400, "request"),
        ({"type": "call_start", "request": 5}, 400, "request"),
        ({"type": "call_start", "request": "x", "seconds": -1}, 400, "seconds"),
        ({"type": "call_start", "request": "x", "seconds": "long"}, 400, "seconds"),
        ({"type": "call_start", "request": "x", "stages": ["a", 1]}, 400, "stages.1"),
        ({"type": "call_start", "request": "x", "tool": "t" * 201}, 400, "tool"),
        ({"type": "call_progress", "request": "x"}, 400, "fraction"),
        ({"type": "call_progress", "request": "x", "fraction": 1.5}, 400, "fraction"),
        ({"type": "close"}, 400, "request"),
        ({"type": "call_finish", "request": "chatcmpl-unknown"}, 404, "request"),
        ([{"type": "close", "request": "x"}], 400, None),
    ],
)
def test_what_is_wrong_with_an_event_is_named(server: Server, event: Any, status: int, param: str | None) -> None:
    with server.http() as http:
        answer = http.post(EVENTS, json=event)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param) and error["message"]
        assert "-0" not in error["message"]


def test_events_that_contradict_are_conflicts(server: Server) -> None:
    request = an_answer(server)
    with server.http() as http:
        assert http.post(EVENTS, json={"type": "call_finish", "request": request}).status_code == 200
        answer = http.post(EVENTS, json={"type": "call_progress", "request": request, "fraction": 0.1})
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")


def test_an_answer_with_several_choices_has_no_single_call(server: Server) -> None:
    client = server.openai()
    several = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": CALLS}], tools=TOOLS, n=2  # type: ignore[arg-type]
    )  # fmt: skip
    prompts = client.completions.create(model="smollm2", prompt=["a", "b"])
    with server.http() as http:
        for request in (several.id, prompts.id):
            answer = http.post(EVENTS, json={"type": "call_start", "request": request})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "request")
            assert "several" in answer.json()["error"]["message"]
    assert not heard(server, several.id)


def test_a_restarted_engine_knows_nothing_and_a_dead_one_says_so(start: Any) -> None:
    with start(restart_wait=0) as server, server.http() as http:
        request = an_answer(server)
        event = {"type": "call_finish", "request": request}
        assert http.post(EVENTS, json=event).status_code == 200

        def kill() -> None:
            os.kill(server.engine_log("start")[-1]["pid"], signal.SIGKILL)

        def refused_then_unknown() -> bool:
            """One life: the pauses between lives grow until one is seen."""
            kill()
            starts, seen = len(server.engine_log("start")), False
            while len(server.engine_log("start")) == starts:
                answer = http.post(EVENTS, json=event)
                seen |= answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
            return seen

        wait_until(refused_then_unknown, "503 while the engine is dead")
        wait_until(lambda: http.post(EVENTS, json=event).status_code == 404, "404 from its successor")


def test_an_engine_that_dies_with_a_question_fails_it(start: Any) -> None:
    with start() as server, server.http() as http:

        def die() -> None:
            server.wait_for("tell")
            os.kill(server.engine_log("start")[-1]["pid"], signal.SIGKILL)

        killer = Thread(target=die)
        killer.start()
        answer = http.post(EVENTS, json={"type": "call_finish", "request": "mute"})
        killer.join()
        assert answer.status_code == 503


# ---- for people who watch ----------------------------------------------------------------------------------


def test_programs_and_their_calls_are_shown_to_who_may_ask(start: Any) -> None:
    with start(api_keys=["a"]) as server, server.http(headers={"authorization": "Bearer a"}) as http:
        client = server.openai("a")
        messages: list[Any] = [{"role": "user", "content": CALLS}]
        answers = [client.chat.completions.create(model="smollm2", messages=messages, tools=TOOLS) for _ in range(3)]  # type: ignore[arg-type]
        body = http.get("/v1/agents").json()
        assert body["programs"] == 3 and body["calls"] == {"kept": 3} and body["num_blocks"] == 64
        assert body["totals"]["started"] == 2 and body["totals"]["on_time_uploads"] == 1
        (node,) = body["data"][0]["nodes"]
        assert node == {
            "name": answers[0].id, "request": answers[0].id, "agent": "coder", "after": ["planner"], "join": "",
            "depth": 0, "critical": True, "importance": 0, "state": "calling", "tool": "weather",
            "age_seconds": 2.5, "tokens": 70,
            "call": {
                "state": "kept", "expected_seconds": 3.0, "remaining_seconds": 2.0, "elapsed_seconds": 1.0,
                "deadline_seconds": 60.0, "held_blocks": 4,
            },
            "blocks": {"needed": 5, "device": 4, "host": 3, "disk": 2, "reserved": 1},
        }  # fmt: skip
        assert body["data"][0]["remaining_seconds"] is None and body["data"][0]["total_seconds"] == 8.0
        assert len(http.get("/v1/agents?limit=2").json()["data"]) == 2
        for wrong in ("0", "501", "many", "-1"):
            assert http.get(f"/v1/agents?limit={wrong}").status_code == 400
        assert httpx.get(f"{server.url}/v1/agents").status_code == 401
        text = http.get("/metrics").text
        for line in ("kvarn_agent_held_blocks 7.0", 'kvarn_agent_uploads_total{outcome="on_time"} 1.0'):
            assert line in text


def test_agent_totals_go_on_when_another_engine_counts_from_zero() -> None:
    metrics = Metrics()
    metrics.engine_stats(EngineStats(agents=AgentStats(calls={"kept": 2}, started=5, forecast_error_seconds=1.5)))
    metrics.engine_is_up(False)
    metrics.engine_stats(EngineStats(agents=AgentStats(started=3)))
    text = metrics.render().decode()
    assert 'kvarn_agent_call_events_total{event="started"} 8.0' in text
    assert "kvarn_agent_forecast_error_seconds_total 1.5" in text
    assert 'kvarn_agent_calls{state="kept"} 0.0' in text


def test_retried_events_of_openai_clients_look_like_its_errors(server: Server) -> None:
    client = server.openai()
    with pytest.raises(openai.NotFoundError, match="chatcmpl-gone"):
        client.post("/agents/events", body={"type": "close", "request": "chatcmpl-gone"}, cast_to=httpx.Response)
