"""The load generator over real sockets: exact requests, a time for every token, a reason for every failure."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import pytest

from kvarn.bench.client import LoadSettings, first_model, run_load, warm_up
from kvarn.bench.http import Endpoint
from kvarn.bench.prompts import PromptMaker
from kvarn.errors import KvarnError
from kvarn.simulation.report import RequestRecord
from kvarn.simulation.workloads import Burst, Fixed, RequestSpec, synthesize
from tests.bench.openai_server import OpenAIServer


def ask(server: OpenAIServer, model: str, specs: list[RequestSpec], **settings: object) -> list[RequestRecord]:
    load = LoadSettings(Endpoint.parse(server.url, "secret"), model, **settings)  # type: ignore[arg-type]
    return asyncio.run(run_load(load, specs, PromptMaker(seed=1, words=(" a", " b"))))


def test_every_token_has_a_time_and_every_request_its_length() -> None:
    with OpenAIServer() as server:
        specs = [RequestSpec(0.0, 7, 5), RequestSpec(0.0, 1, 1), RequestSpec(0.02, 300, 40)]
        records = ask(server, "tokens", specs)
    assert [record.error for record in records] == [None] * 3
    assert [len(record.token_times) for record in records] == [5, 1, 40]
    assert [record.prompt_tokens for record in records] == [7, 1, 300]
    for record in records:
        assert record.arrival < record.token_times[0]
        assert list(record.token_times) == sorted(record.token_times)
    assert records[2].arrival - records[0].arrival == pytest.approx(0.02)
    first = min(server.bodies, key=lambda body: abs(len(body["prompt"]) - 7))
    assert first["max_tokens"] == 5
    assert first["ignore_eos"] is first["stream"] is True
    assert "Authorization: Bearer secret" in server.headers[0]


def test_requests_leave_at_their_time_however_slow_the_server() -> None:
    """The server answers nobody before all 40 requests are there: a closed loop would never end."""
    with OpenAIServer(wait_for=40) as server:
        records = ask(server, "tokens", synthesize(40, Burst(0.1), Fixed(4), Fixed(2)), timeout=30.0)
    assert all(record.ok for record in records)
    assert server.most == 40


def test_a_concurrency_cap_holds() -> None:
    with OpenAIServer() as server:
        records = ask(server, "tokens", synthesize(30, Burst(), Fixed(4), Fixed(9)), concurrency=3)
    assert all(record.ok for record in records)
    assert server.most <= 3


def test_tokens_that_share_an_event_share_its_time_and_the_usage_counts() -> None:
    with OpenAIServer() as server:
        (record,) = ask(server, "joined", [RequestSpec(0.0, 4, 10)], chat=True)
    assert len(record.token_times) == 10
    assert len(set(record.token_times)) <= 5
    assert record.prompt_tokens == 9  # what the server says, template and all
    assert server.bodies[0]["messages"][0]["content"].split() != []
    assert server.headers[0].startswith("POST /v1/chat/completions")


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("busy", "HTTP 429: too many requests"),
        ("broken", "HTTP 500: oops"),
        ("cut", "disconnected mid-stream"),
        ("sick", "error mid-stream: out of memory"),
        ("shapeless", "unreadable answer"),
        ("junk", "unreadable answer"),
        ("nonsense", "not an HTTP server"),
    ],
)
def test_failures_are_records_with_reasons(model: str, reason: str) -> None:
    with OpenAIServer() as server:
        failed, fine = (
            ask(server, model, [RequestSpec(0.0, 4, 10)])[0],
            ask(server, "tokens", [RequestSpec(0.0, 4, 10)])[0],
        )
    assert not failed.ok
    assert failed.error is not None
    assert failed.error.startswith(reason)
    assert fine.ok


def test_a_server_that_says_nothing_times_out() -> None:
    with OpenAIServer() as server:
        (record,) = ask(server, "silent", [RequestSpec(0.0, 4, 10)], timeout=0.1)
    assert record.error == "timeout after 0.1 s"


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_no_server_is_said_before_the_load_and_counted_during_it() -> None:
    endpoint = Endpoint.parse(f"127.0.0.1:{closed_port()}")
    load = LoadSettings(endpoint, "m")
    with pytest.raises(KvarnError, match="is it running"):
        asyncio.run(first_model(endpoint))
    with pytest.raises(KvarnError, match="does not answer: cannot connect"):
        asyncio.run(warm_up(load, RequestSpec(0.0, 1, 1), PromptMaker(), 1))
    (record,) = asyncio.run(run_load(load, [RequestSpec(0.0, 1, 1)], PromptMaker()))
    assert record.error is not None
    assert record.error.startswith("cannot connect")


def test_the_model_is_asked_for_when_not_named() -> None:
    with OpenAIServer() as server:
        assert asyncio.run(first_model(Endpoint.parse(server.url))) == "tokens"


@pytest.mark.parametrize("url", ["ftp://host/v1", "http://", "http://host:port", ""])
def test_what_is_no_server_address_is_refused(url: str) -> None:
    with pytest.raises(KvarnError, match="base URL"):
        Endpoint.parse(url)


def test_addresses_as_people_write_them() -> None:
    assert Endpoint.parse("localhost:8000") == Endpoint("localhost", 8000, False, "/v1")
    assert Endpoint.parse("https://api.example/v1/") == Endpoint("api.example", 443, True, "/v1")
    assert Endpoint.parse("http://h:1/openai/v1").path == "/openai/v1"


def test_the_same_seed_asks_the_same_and_warm_up_asks_something_else() -> None:
    with OpenAIServer() as server:
        spec = RequestSpec(0.0, 50, 1)
        load = LoadSettings(Endpoint.parse(server.url), "tokens")
        asyncio.run(warm_up(load, spec, PromptMaker(seed=1), 1))
        for _ in range(2):
            asyncio.run(run_load(load, [spec, replace(spec, arrival=0.01)], PromptMaker(seed=1)))
        prompts = [tuple(body["prompt"]) for body in server.bodies]
    assert prompts[1:3] == prompts[3:5]
    assert len(set(prompts)) == 3
