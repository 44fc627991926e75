"""`kvarn bench` as a person and as a machine run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvarn.cli.bench import app
from kvarn.errors import KvarnError
from kvarn.simulation import plots
from kvarn.simulation.report import RequestRecord
from tests.bench.openai_server import OpenAIServer

runner = CliRunner()


def test_serve_prints_a_report_and_writes_its_files(tmp_path: Path) -> None:
    with OpenAIServer() as server:
        arguments = ["serve", "--base-url", server.url, "-n", "6", "--within", "0.05", "--input-tokens", "16"]
        arguments += [
            "--output-tokens",
            "8",
            "--slo-ttft",
            "10",
            "--output",
            str(tmp_path),
            "--plot",
            str(tmp_path / "run.png"),
        ]
        outcome = runner.invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "6 of 6 completed" in outcome.output
    assert "100% keep the SLOs" in outcome.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["conditions"]["model"] == "tokens"
    assert report["output_tokens"] == 48
    requests = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [len(request["token_times"]) for request in requests] == [8] * 6
    assert min(request["arrival"] for request in requests) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_serve_replays_a_trace_as_json_with_shared_prefixes(tmp_path: Path) -> None:
    rows = [{"timestamp": 20 * i, "input_length": 600, "output_length": 9, "hash_ids": [1, 2 + i]} for i in range(3)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    with OpenAIServer() as server:
        arguments = ["serve", "--base-url", server.url, "--trace", str(trace), "--trace-format", "mooncake", "--json"]
        outcome = runner.invoke(app, [*arguments, "--max-output", "4", "--warmup", "0", "--api-key", "hush"])
    report = json.loads(outcome.stdout)
    assert report["completed"] == 3
    assert report["output_tokens"] == 12
    assert "hush" not in outcome.output
    prefixes = {tuple(body["prompt"][:512]) for body in server.bodies}
    assert len(prefixes) == 1
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 3


def test_serve_fails_with_its_exit_code_when_nothing_completed() -> None:
    with OpenAIServer() as server:
        arguments = ["serve", "--base-url", server.url, "--model", "busy", "-n", "2", "--warmup", "0", "--within", "0"]
        outcome = runner.invoke(app, arguments)
    assert outcome.exit_code == 1
    assert "HTTP 429: too many requests" in outcome.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "--chat"], "--tokenizer"),
        (["serve", "--arrivals", "poisson", "--rate", "0"], "rate is 0"),
        (["serve", "--output-tokens", "0"], "tokens is 0"),
        (["serve", "--trace", "/nowhere.jsonl"], "cannot read"),
        (["serve", "--base-url", "gopher://x"], "base URL"),
    ],
)
def test_impossible_wishes_are_refused_in_words(arguments: list[str], said: str) -> None:
    outcome = runner.invoke(app, arguments)
    assert isinstance(outcome.exception, KvarnError)
    assert said in str(outcome.exception)


def test_offline_measures_the_real_engine() -> None:
    arguments = "offline --precision int8 -b 1 -b 2 --input-tokens 8 --output-tokens 4 --prefill 16 --repeats 1 --json"
    outcome = runner.invoke(app, arguments.split())
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(outcome.stdout)
    assert (report["precision"], report["kv_dtype"]) == ("int8", "int8"), "what it chose, not what it was asked for"
    assert [(one["kind"], one["size"]) for one in report["readings"]] == [("decode", 1), ("decode", 2), ("prefill", 16)]
    assert all(one["tokens_per_second"] > 0 for one in report["readings"])


def test_waiting_and_streaming_requests_over_time() -> None:
    records = [RequestRecord(10.0, 1, (12.0, 14.0)), RequestRecord(11.0, 1, (13.0,)), RequestRecord(11.0, 1, error="x")]
    moments, running, queued = plots.running_and_queued(records, start=10.0, points=5)
    assert moments.tolist() == [0, 1, 2, 3, 4]
    assert queued.tolist() == [1, 2, 1, 0, 0]
    assert running.tolist() == [0, 0, 1, 1, 0]


@pytest.mark.parametrize("name", ["run.docx", "file/run.png"])
def test_a_picture_that_cannot_be_written_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KvarnError, match="cannot draw into"):
        plots.draw_run([RequestRecord(0.0, 1, (1.0, 2.0))], tmp_path / name)


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(KvarnError, match="nothing to draw"):
        plots.draw_run([RequestRecord(0.0, 1, error="x")], tmp_path / "run.png")
