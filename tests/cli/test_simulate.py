"""`kvarn simulate` as a person and as a machine run it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvarn.cli.main import app
from kvarn.errors import KvarnError
from kvarn.serving.api.recorder import FinishedSequence, Recorder
from kvarn.serving.sampling.params import SamplingParams

SMALL = ["--workload", "poisson:30", "-n", "40", "--input-tokens", "200", "--output-tokens", "30"]


def simulate(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["simulate", *arguments])


def test_prints_the_report_of_bench_serve() -> None:
    outcome = simulate(*SMALL, "--hardware", "rtx4090", "--abandon", "0.5:0.2", "--readers", "0.5:10,0.5:30")
    assert outcome.exit_code == 0, outcome.output
    for text in ("TTFT", "effective tokens/s", "failed: client left", "preemptions", "RTX 4090"):
        assert text in outcome.output


def test_the_same_seed_prints_the_same_bytes() -> None:
    arguments = (*SMALL, "--kv-memory", "512MiB", "--json")
    one, same, other = (simulate(*arguments, "--seed", seed).stdout for seed in ("1", "1", "2"))
    assert one == same != other
    report = json.loads(one)
    assert report["completed"] == 40
    assert report["engine"]["kv_tokens"] == 4096
    assert report["conditions"]["hardware"] == "h200"


def test_replays_a_trace_and_writes_what_it_found(tmp_path: Path) -> None:
    rows = [{"timestamp": 100 * i, "input_length": 600, "output_length": 5 + i, "hash_ids": [1]} for i in range(5)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "out"
    outcome = simulate("--trace", str(trace), "-n", "4", "--output", str(folder), "--plot", str(folder))
    assert outcome.exit_code == 0, outcome.output
    assert json.loads((folder / "report.json").read_text())["output_tokens"] == 5 + 6 + 7 + 8
    assert len((folder / "requests.jsonl").read_text().splitlines()) == 4
    assert (folder / "run.png").stat().st_size > 10_000
    assert (folder / "load.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hardware", "abacus"), "rtx4090, a6000"),
        (("--model", "gpt9"), "llama3-8b"),
        (("--workload", "flood:3"), "burst"),
        (("--workload", "burst"), "like burst:60"),
        (("--readers", "fast"), "0.4:15,0.6:20"),
        (("--abandon", "0.1"), "0.1:5"),
        (("--input-deviation", "20"), "--input-tokens"),
        (("--policy", "streaming", "--policy-option", "tick=soon"), "a number"),
        (("--policy-option", "tick=1"), "only the policies streaming and agentic"),
        (("--trace", "/nowhere/trace.jsonl"), "cannot read"),
        (("--hardware", "rtx4090", "--model", "qwen2.5-32b"), "no KV block fits"),
        (("--kv-memory", "lots"), "--kv-memory"),
    ],
)
def test_errors_are_in_words(arguments: tuple[str, ...], message: str) -> None:
    outcome = simulate(*arguments)
    assert isinstance(outcome.exception, KvarnError)  # `kvarn` prints it and ends with code 2
    assert message in str(outcome.exception)


def test_nobody_served_is_exit_code_1() -> None:
    assert simulate("--workload", "burst:2", "--input-tokens", "9000").exit_code == 1


def test_replays_what_a_server_recorded(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    recorder = Recorder(trace, block_size=16, content=False)
    for i in range(4):
        prompt = [7] * 64 + [i] * 10  # the first four blocks are shared
        recorder.record(
            FinishedSequence(
                f"r{i}",
                1000.0 + i,
                float(i),
                "",
                prompt,
                [1] * (5 + i),
                0,
                [0.1] * (5 + i),
                "length",
                SamplingParams(),
                20.0,
            )
        )
    recorder.close()
    report = json.loads(simulate("--trace", str(trace), "--json").stdout)
    assert report["completed"] == 4
    assert report["output_tokens"] == 5 + 6 + 7 + 8
    assert report["engine"]["prefix_hit_tokens"] == 3 * 64
