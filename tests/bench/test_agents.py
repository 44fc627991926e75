"""`kvarn bench agents` over sockets: against kvarn with its events, and against servers that know nothing of agents."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from kvarn.cli.bench import app
from kvarn.errors import KvarnError
from kvarn.simulation.agents.programs import ModelNode, ProgramSpec, ToolNode, read_programs, write_programs
from kvarn.simulation.agents.workload import AgentWorkload, draw_programs
from kvarn.simulation.workloads import Burst
from tests.bench.openai_server import OpenAIServer
from tests.conftest import ServerProcess, serve

runner = CliRunner()


@pytest.fixture(scope="module")
def kvarn() -> Iterator[ServerProcess]:
    """A server of few blocks, so that agents are in each other's way."""
    with serve("--policy", "agentic", "--kv-memory", "48MiB", "--host-memory", "256MiB") as server:
        yield server


def bench(url: str, *arguments: str) -> dict[str, Any]:
    outcome = runner.invoke(app, ["agents", "--base-url", url, "--json", *arguments])
    assert outcome.exit_code == 0, outcome.output
    report: dict[str, Any] = json.loads(outcome.stdout)
    return report


SMALL = ("-n", "2", "--qps", "0", "--token-scale", "0.03", "--durations", "lognormal:0.02")


@pytest.fixture(scope="module")
def plain(kvarn: ServerProcess) -> dict[str, Any]:
    return bench(f"{kvarn.url}/v1", *SMALL, "--no-hints", "--events", "none")


@pytest.mark.parametrize("events", ["explicit", "implicit"])
def test_kvarn_is_told_of_tools_and_does_the_same_work_however_it_is_told(
    kvarn: ServerProcess, events: str, plain: dict[str, Any]
) -> None:
    report = bench(f"{kvarn.url}/v1", *SMALL, "--events", events)
    assert report["conditions"]["server"] == {"token_ids": True, "events": True}
    assert (report["completed"], report["failures"], report["refused_events"]) == (2, {}, {})
    specs = draw_programs(AgentWorkload(programs=2, arrivals=Burst(0.0), token_scale=0.03))
    assert report["output_tokens"] == sum(node.output_tokens for spec in specs for node in spec.model_nodes)
    assert report["tool_calls"] == sum(len(spec.tool_nodes) for spec in specs)
    assert report["tool_seconds"] > 0.01 * report["tool_calls"]
    assert report["cached_tokens"] > 0
    assert report["work"] == plain["work"]


def test_nothing_of_a_program_is_left_when_it_has_ended(kvarn: ServerProcess) -> None:
    bench(f"{kvarn.url}/v1", *SMALL, "--app", "deep-research")
    streams = httpx.get(f"{kvarn.url}/v1/streams", timeout=30).json()
    assert streams["streams"]["total"] == 0
    report = httpx.post(f"{kvarn.url}/v1/agents/events", json={"type": "close", "program": "deep-research-0"})
    assert report.json()["closed"] == 0  # the run has closed it itself


def test_a_run_leaves_report_programs_and_picture_and_can_be_repeated(tmp_path: Path) -> None:
    with OpenAIServer() as server:
        first = bench(
            server.url, *SMALL, "--model", "ids", "--output", str(tmp_path), "--plot", str(tmp_path / "run.png")
        )
        again = bench(server.url, "--model", "ids", "--trace", str(tmp_path / "programs.jsonl"))
    assert first["conditions"]["server"] == {"token_ids": True, "events": False}
    assert again["work"] == first["work"]
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["programs"]) == len(read_programs(tmp_path / "programs.jsonl")) == 2
    assert report["summary"]["cached_tokens"] > 0
    asked = [body for body in server.bodies if body["model"] == "ids"][1:]
    assert not any("kv_hints" in body for body in asked), "a server without events is told nothing"
    assert all(body["ignore_eos"] and isinstance(body["prompt"][0], int) for body in asked)


def chain() -> ProgramSpec:
    """A model call, its tool, and the call that goes on."""
    nodes = (
        ModelNode("ask", "asker", system_tokens=20, own_tokens=3, output_tokens=5),
        ToolNode("look", "search", ("ask",), seconds=0.05, result_tokens=4),
        ModelNode("tell", "asker", ("look",), "ask", own_tokens=2, output_tokens=3),
    )
    return ProgramSpec("chain-0", 0.0, "chain", nodes)


def test_a_conversation_goes_on_with_the_tokens_that_the_server_made(tmp_path: Path) -> None:
    write_programs([chain()], tmp_path / "chain.jsonl")
    with OpenAIServer() as server:
        report = bench(server.url, "--model", "ids", "--trace", str(tmp_path / "chain.jsonl"), "--time-scale", "2")
    _, first, second = (body["prompt"] for body in server.bodies)
    assert second[: 23 + 5] == [*first, 24, 25, 26, 27, 28]
    assert len(second) == 23 + 5 + 4 + 2
    assert report["mean_seconds"] > report["tool_seconds"] >= 0.1
    assert list(report["agent_seconds"]) == ["asker"]


def test_a_server_that_gives_no_token_ids_is_sent_text(tmp_path: Path) -> None:
    write_programs([chain()], tmp_path / "chain.jsonl")
    with OpenAIServer() as server:
        arguments = ["agents", "--base-url", server.url, "--model", "tokens", "--trace", str(tmp_path / "chain.jsonl")]
        outcome = runner.invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "prompts are text" in outcome.output and "plain requests" in outcome.output
    assert "1 of 1 completed" in outcome.output
    assert "cached" not in outcome.output, "it has not said what it had cached"
    first, second = (body["prompt"] for body in server.bodies[-2:])
    assert len(first.split()) == 23
    assert second.startswith(first + " word" * 5)


def test_a_request_that_fails_ends_its_program_and_is_named(tmp_path: Path) -> None:
    nodes = chain().nodes
    unlucky = replace(chain(), id="chain-1", nodes=(*nodes[:2], replace(nodes[2], output_tokens=77)))  # type: ignore[call-arg]
    write_programs([unlucky, chain()], tmp_path / "two.jsonl")
    with OpenAIServer() as server:
        report = bench(server.url, "--model", "ids", "--trace", str(tmp_path / "two.jsonl"))
    assert report["completed"] == 1
    assert report["failures"] == {"tell: HTTP 500: oops": 1}


def test_a_server_that_answers_nothing_is_an_error_with_its_reason() -> None:
    with OpenAIServer() as server:
        outcome = runner.invoke(app, ["agents", "--base-url", server.url, "--model", "busy"])
    assert isinstance(outcome.exception, KvarnError)
    assert "too many requests" in str(outcome.exception)
