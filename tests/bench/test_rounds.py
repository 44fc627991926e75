"""`kvarn bench rounds` over sockets: against kvarn, and against servers that know more or less of segments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvarn.cli.bench import app
from kvarn.errors import KvarnError
from kvarn.simulation.rounds.scenarios import Span
from kvarn.simulation.rounds.workload import RoundWorkload, draw_societies
from tests.bench.openai_server import OpenAIServer
from tests.conftest import MODEL, ServerProcess

runner = CliRunner()
SMALL = ("--agents", "3", "--rounds", "2", "--history", "20:30", "--output", "4:6", "--task-tokens", "8")
SPEC = draw_societies(
    RoundWorkload(agents=3, rounds=2, history=Span(20, 30), output=Span(4, 6), task_tokens=8),
)[0]


def bench(url: str, *arguments: str) -> dict[str, Any]:
    outcome = runner.invoke(app, ["rounds", url, "--json", *arguments])
    assert outcome.exit_code == 0, outcome.output
    report: dict[str, Any] = json.loads(outcome.stdout)
    return report


def prompts(server: OpenAIServer) -> list[list[int]]:
    """Without the questions that find out what the server knows; requests of a round in order of their answers."""
    bodies = [body for body in server.bodies if body["max_tokens"] > 2]
    return [
        body.get("prompt") or [token for part in body["segments"] for token in part["content"]]
        for body in sorted(bodies, key=lambda body: (len(body.get("segments", ())), body["max_tokens"]))
    ]


@pytest.mark.parametrize("arguments", [("--societies", "2"), ("--tokenizer", MODEL)])
def test_a_society_talks_on_kvarn(server: ServerProcess, arguments: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    report = bench(f"{server.url}/v1", *SMALL, *arguments, "--plain", "--save", str(file))
    societies = report["conditions"]["societies"]
    assert (report["rounds"], report["requests"], report["failures"]) == (2 * societies, 6 * societies, {})
    wanted = sum(turn.output_tokens for turns in SPEC.rounds for turn in turns)
    assert report["conditions"]["server"] == {"token_ids": True, "segments": False}
    saved = json.loads(file.read_text())
    assert sum(turn["output_tokens"] for turn in saved["turns"] if turn["society"] == SPEC.id) == wanted
    assert report["round_p50_seconds"] >= report["last_first_token_p50_seconds"] > 0
    for turn in saved["turns"]:
        assert turn["ready"] <= turn["sent"] < turn["first_token"] <= turn["end"]


def test_kvarn_is_told_of_segments_and_computes_the_same(server: ServerProcess) -> None:
    told, plain = (bench(f"{server.url}/v1", *SMALL, "--seed", "7", *more) for more in ([], ["--plain"]))
    assert told["conditions"]["server"]["segments"]
    assert (told["prompt_tokens"], told["output_tokens"]) == (plain["prompt_tokens"], plain["output_tokens"])


def test_a_server_that_takes_segments_gets_the_tokens_that_others_get_as_a_prompt() -> None:
    with OpenAIServer() as told:
        report = bench(told.url, *SMALL, "--model", "parts")
        assert report["conditions"]["server"] == {"token_ids": True, "segments": True}
    with OpenAIServer() as plain:
        bench(plain.url, *SMALL, "--model", "parts", "--plain")
    assert sorted(prompts(told)) == sorted(prompts(plain))
    asked = [body for body in told.bodies if "round" in body]
    assert {(body["round"]["size"], body["round"]["agent"]) for body in asked} == {(3, "Ada"), (3, "Bram"), (3, "Cleo")}
    assert len({body["round"]["id"] for body in asked}) == 2
    kinds = [[part["kind"] for part in body["segments"]] for body in asked]
    assert kinds == [["private", "shared", "shared", "shared", "task"]] * 6
    shared = sum(len(part["content"]) for body in asked for part in body["segments"] if part["kind"] == "shared")
    assert (report["reused_tokens"], report["cached_tokens"]) == (shared, shared + 3 * 6)
    assert report["computed_tokens"] == report["prompt_tokens"] - shared - 3 * 6
    assert not any("round" in body or "segments" in body for body in plain.bodies)


def test_agents_read_the_very_tokens_that_the_server_made() -> None:
    with OpenAIServer() as server:
        bench(server.url, *SMALL, "--model", "parts")
    first, second = (
        {body["round"]["agent"]: body for body in server.bodies if body.get("round", {}).get("id", "").endswith(end)}
        for end in ("/0", "/1")
    )
    said = {}
    for agent, body in first.items():
        length = sum(len(part["content"]) for part in body["segments"])
        said[f"0/{agent}"] = [1 + length + place for place in range(body["max_tokens"])]
    for body in second.values():
        heard = {part["id"]: part["content"] for part in body["segments"] if part["kind"] == "shared"}
        assert heard == said


def test_nobody_reads_the_token_that_ends_an_answer() -> None:
    with OpenAIServer() as server:
        bench(server.url, *SMALL, "--model", "brief", "--plain", "--no-ignore-eos", "--task-tokens", "1")
    later = [prompt for prompt in prompts(server) if 7 in prompt]
    assert len(later) == 3
    for prompt in later:
        assert 0 not in prompt
        assert prompt[-7:-1] == [7, 8] * 3


def test_a_server_without_segments_gets_plain_prompts_and_the_command_says_so() -> None:
    with OpenAIServer() as server:
        outcome = runner.invoke(app, ["rounds", server.url, *SMALL, "--model", "ids"])
    assert outcome.exit_code == 0, outcome.output
    assert "takes no segments" in outcome.output and "plain prompts" in outcome.output
    assert "2, 6 requests" in outcome.output and "as prefixes" in outcome.output
    assert len(prompts(server)) == 6


def test_a_server_that_gives_no_token_ids_needs_a_tokenizer() -> None:
    with OpenAIServer() as server:
        outcome = runner.invoke(app, ["rounds", server.url, *SMALL, "--plain"])
        assert isinstance(outcome.exception, KvarnError) and "--tokenizer" in str(outcome.exception)
        report = bench(server.url, *SMALL, "--plain", "--tokenizer", MODEL)
    assert report["rounds"] == 2
    assert report["conditions"]["server"] == {"token_ids": False, "segments": False}


def test_a_request_that_fails_ends_its_society_and_is_named() -> None:
    with OpenAIServer() as server:
        arguments = ["rounds", server.url, "--json", *SMALL, "--output", "77", "--model", "ids", "--plain"]
        outcome = runner.invoke(app, arguments)
    assert outcome.exit_code == 1
    report = json.loads(outcome.stdout)
    assert report["failures"] == {"HTTP 500: oops": 1}
    assert (report["rounds"], report["round_p50_seconds"]) == (0, None)


def test_what_is_wrong_is_an_error_with_its_reason() -> None:
    with OpenAIServer() as server:
        for arguments, message in (
            (["--model", "busy"], "too many requests"),
            (["--history", "some"], "history is 'some'"),
            (["--scenario", "moon"], "scenario is 'moon'"),
        ):
            outcome = runner.invoke(app, ["rounds", server.url, *arguments])
            assert isinstance(outcome.exception, KvarnError) and message in str(outcome.exception)
