"""Events as JSON over a real socket; who refuses or is not there breaks nothing; several tools of one model call."""

from __future__ import annotations

import asyncio
import logging
import socket

import pytest

from kvarn.clients.calls import OpenCalls
from kvarn.clients.events import AgentEvents, AsyncAgentEvents, request_extras
from kvarn.errors import KvarnError
from kvarn.serving.agents.events import CallFinish, CallProgress, CallStart, Close
from kvarn.serving.agents.hints import AgentHints

EVENTS = {
    CallStart("r", tool="t", seconds=2.5, stages=("a", "b")): (
        {"type": "call_start", "request": "r", "tool": "t", "seconds": 2.5, "stages": ["a", "b"]}
    ),
    CallStart("r"): {"type": "call_start", "request": "r"},
    CallProgress("r", fraction=0.5): {"type": "call_progress", "request": "r", "fraction": 0.5},
    CallProgress("r", stage="b"): {"type": "call_progress", "request": "r", "stage": "b"},
    CallFinish("r", seconds=0.0): {"type": "call_finish", "request": "r", "seconds": 0.0},
    Close(program="p"): {"type": "close", "program": "p"},
    Close("r"): {"type": "close", "request": "r"},
}


def test_events_say_what_is_known_and_no_more(server):
    with AgentEvents(server.base_url + "/") as events:
        assert all(events.send(event) for event in EVENTS)
    assert server.events == list(EVENTS.values())


def test_events_from_asyncio_carry_the_key(server):
    async def send() -> list[bool]:
        async with AsyncAgentEvents(server.base_url, api_key="secret") as events:
            return [await events.send(event) for event in EVENTS]

    assert all(asyncio.run(send()))
    assert server.events == [body | {"key": "Bearer secret"} for body in EVENTS.values()]


@pytest.mark.parametrize("status", [400, 404, 409, 500, 503])
def test_a_refusal_is_a_warning_once(server, caplog, status):
    server.event_status = status
    with caplog.at_level(logging.DEBUG, "kvarn.clients"), AgentEvents(server.base_url) as events:
        assert not events.send(CallStart("r"))
        assert not events.send(CallFinish("r"))
    assert [record.levelname for record in caplog.records if record.name == "kvarn.clients"] == ["WARNING", "DEBUG"]
    assert f"answered {status} to {{'type': 'call_start', 'request': 'r'}}" in caplog.text


def test_a_server_that_is_not_there_is_a_warning_once(caplog):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"

        async def send() -> bool:
            async with AsyncAgentEvents(url) as events:
                return await events.send(Close("r"))

        with caplog.at_level(logging.WARNING, "kvarn.clients"):
            with AgentEvents(url) as events:
                assert not events.send(CallStart("r"))
                assert not events.send(CallFinish("r"))
            assert not asyncio.run(send())
    assert caplog.text.count("cannot be told of tool calls") == 2, "once for each of the two"


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000/v1", "ftp://host/v1", "http://host:port/v1", "http:///v1"])
def test_an_address_that_is_none_is_refused_at_once(url):
    with pytest.raises(KvarnError, match=r"base_url is .*expected one like"):
        AgentEvents(url)


def test_hints_as_arguments_of_a_request():
    extras = request_extras(AgentHints(program="run 1", agent="writer", after=("a",), critical=True, tool_seconds=0.0))
    agent = {"program": "run 1", "agent": "writer", "after": ("a",), "critical": True, "tool_seconds": 0.0}
    assert extras == {
        "extra_headers": {"x-session-id": "run 1"},
        "extra_body": {"kv_hints": {"protocol_version": 1, "agent": agent}},
    }
    assert request_extras(AgentHints())["extra_headers"] == {}


def test_of_several_tools_the_first_starts_the_call_and_the_last_ends_it():
    calls = OpenCalls({"slow": 5.0, "quick": 0.1})
    calls.answered("chat-1", {"1": "quick", "2": "slow", "3": "unknown"})
    calls.answered("chat-2", {"4": "unknown"})
    assert calls.started("1") == CallStart("chat-1", tool="slow", seconds=5.0)
    assert calls.started("2") is None
    assert calls.started("4") == CallStart("chat-2", tool="unknown")
    assert calls.ended("2") is None
    assert calls.ended("1") is None
    assert calls.started("3") is None
    assert calls.ended("3") == CallFinish("chat-1")
    assert calls.ended("3") is None
    assert calls.started("never asked for") is None


def test_calls_that_never_end_are_forgotten_in_the_end():
    calls = OpenCalls()
    for i in range(5000):
        calls.answered(f"chat-{i}", {f"call-{i}": "tool"})
    assert calls.started("call-0") is None
    assert calls.started("call-4999") == CallStart("chat-4999", tool="tool")
