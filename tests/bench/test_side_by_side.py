"""The scripts that compare engines: figures survive, merge and render as the rules say, and the real engine runs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from benchmarks import engines, machine, offline, render, results, work

from kvarn.simulation.report import RequestRecord, summarize


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "QUICK_FOLDER", tmp_path)


def session(
    label: str, decode: list[float], prefill: list[float], foreign: float = 0.0, weights: str = "bf16"
) -> dict[str, Any]:
    readings = [("decode", 1, decode), ("prefill", 512, prefill)]
    return {
        "about": {"version": "1", "label": label, "weights": weights, "settings": "defaults"},
        "load_seconds": 2.0,
        "readings": [
            {"kind": kind, "size": size, "repeats": rates, "foreign_cores": [foreign] * len(rates)}
            for kind, size, rates in readings
        ],
    }


CONDITIONS = {
    "batches": [1], "prefills": [512], "input_tokens": 128, "output_tokens": 128, "rounds": 2, "repeats": 2,
    "threads": 2, "model": "m",
}  # fmt: skip


def test_a_table_shows_medians_over_rounds_with_their_spread_and_the_ratio_to_the_best() -> None:
    kept = results.Results("offline", CONDITIONS, merge=False)
    kept.add_session("kvarn-bf16", session("kvarn bf16", [80.0, 90.0], [1000.0, 1000.0]), first=True)
    kept.add_session("vllm-bf16", session("vLLM bf16", [50.0, 50.0], [2000.0, 2000.0], foreign=0.9), first=True)
    kept.add_session("llamacpp-bf16", {"error": "no compiler"}, first=True)
    kept.add_session("kvarn-bf16", session("kvarn bf16", [100.0, 110.0], [1000.0, 1000.0]), first=False)
    render.render(kept.path)
    table = kept.path.with_suffix(".md").read_text()
    assert "| bf16 | kvarn bf16 | 95 (80-110) | 1,000 | 2.0 |" in table
    assert "| bf16 | vLLM bf16 | 50* | 2,000* | 2.0 |" in table
    assert "| bf16 | **kvarn / best other** | **1.90** | **0.50** |  |" in table
    assert "llamacpp-bf16 failed: no compiler" in table
    assert kept.path.with_suffix(".svg").read_text().startswith("<?xml")


def quality(int8: float, int4: float) -> None:
    kept = results.Results("quality", {}, merge=False)
    kept.data["rows"] = [{"precision": "int8", "mean_kl": int8}, {"precision": "int4", "mean_kl": int4}]
    kept.save()


def test_a_precision_that_strays_from_float32_competes_in_its_class_but_not_with_everyone() -> None:
    quality(int8=0.01, int4=0.03)
    kept = results.Results("offline", CONDITIONS, merge=False)
    kept.add_session("kvarn-int8", session("kvarn int8", [100.0], [100.0], weights="8-bit"), first=True)
    kept.add_session("kvarn-int4", session("kvarn int4", [300.0], [300.0], weights="4-bit"), first=True)
    kept.add_session("openvino-4bit", session("OpenVINO", [200.0], [200.0], weights="4-bit"), first=True)
    render.render(kept.path)
    table = kept.path.with_suffix(".md").read_text()
    assert "| 4-bit | **kvarn / best other** | **1.50** | **1.50** |  |" in table
    assert "best of all** | **0.50** | **0.50** |  |" in table


def test_merging_keeps_the_others_and_replaces_what_is_measured_again() -> None:
    first = results.Results("offline", CONDITIONS, merge=False)
    first.add_session("kvarn", session("kvarn", [1.0], [1.0]), first=True)
    first.add_session("vllm", session("vLLM", [2.0], [2.0]), first=True)
    again = results.Results("offline", CONDITIONS, merge=True)
    again.add_session("kvarn", session("kvarn", [3.0], [3.0]), first=True)
    merged = json.loads(again.path.read_text())["engines"]
    assert [one["readings"][0]["repeats"] for one in merged["kvarn"]["sessions"]] == [[3.0]]
    assert [one["readings"][0]["repeats"] for one in merged["vllm"]["sessions"]] == [[2.0]]
    with pytest.raises(SystemExit, match="other conditions"):
        results.Results("offline", CONDITIONS | {"threads": 1}, merge=True)


def test_streaming_is_compared_seed_by_seed_and_held_to_its_bars() -> None:
    conditions = {
        "model": "m", "threads": 2, "requests": 2, "input_tokens": 8, "output_tokens": 8, "deviation": 2.0,
        "over_commit": 5.0, "kv_tokens": 16, "stream_rate": 8.0,
    }  # fmt: skip
    kept = results.Results("streaming", conditions, merge=False)
    for name, waits in (("kvarn-streaming", (1.0, 2.0)), ("kvarn-fcfs", (4.0, 4.0)), ("vllm-bf16", (8.0, 5.0))):
        bursts = []
        for seed, wait in enumerate(waits):
            records = [RequestRecord(0.0, 8, (first, wait + 8.0), 8.0) for first in (0.1, wait)]
            report = summarize(records).to_json()
            bursts.append({"seed": seed, **report, "counted": {"preemptions": 3.0}, "foreign_cores": 0.0})
        about = {"version": "1", "label": name, "weights": "bf16", "settings": "defaults"}
        kept.add_session(name, {"about": about, "start_seconds": 1.0, "bursts": bursts}, first=True)
    render.render(kept.path)
    table = kept.path.with_suffix(".md").read_text()
    assert "| over | TTFT mean s | TTFT P99 s | tokens/s | effective tokens/s |" in table
    render.render_bars(kept.path.parent)
    rows = [
        line.split("|")[1:] for line in (kept.path.parent / "bars.md").read_text().splitlines() if "streaming," in line
    ]
    verdicts = {
        (what.strip(), condition.split("; times ")[1].strip()): verdict.strip()
        for what, condition, _, _, verdict, _ in rows
    }
    assert verdicts == {
        ("streaming, P99 TTFT", "kvarn-fcfs"): "**missed**",
        ("streaming, P99 TTFT", "vllm-bf16"): "holds",
        ("streaming, throughput", "kvarn-fcfs"): "holds",
    }


def test_served_bursts_become_one_row_a_server() -> None:
    times = tuple(1.0 + j / 10 for j in range(11))
    burst = {**summarize([RequestRecord(0.5, 8, times)], stream_rate=20.0).to_json(), "foreign_cores": 0.0}
    one = {"about": {"version": "1", "precision": "bf16", "settings": "s"}, "start_seconds": 3.0, "bursts": [burst]}
    conditions = CONDITIONS | {"requests": 1, "within": 1.0, "stream_rate": 20.0}
    kept = results.Results("served", conditions, merge=False)
    kept.add_session("kvarn", one, first=True)
    kept.add_session("llamacpp", one, first=True)
    render.render(kept.path)
    table = kept.path.with_suffix(".md").read_text()
    assert "| kvarn | 7.33 | 0.5 | 0.5 | 0.5 | 0.1 | 0.1 | 0.1 | 7.33 | 3 | 0 |" in table
    assert "throughput 1.00x (higher is better), P99 TTFT 1.00x, P99 ITL 1.00x (lower is better)" in table


def test_bars_are_told_from_results_with_the_condition_and_what_was_not_measured() -> None:
    kept = results.Results("offline", CONDITIONS | {"batches": [1, 16]}, merge=False)
    ours, theirs = session("kvarn bf16", [120.0], [1000.0]), session("vLLM bf16", [100.0], [1000.0])
    for one, rate in ((ours, 700.0), (theirs, 600.0)):
        one["readings"].append({"kind": "decode", "size": 16, "repeats": [rate], "foreign_cores": [0.0]})
    kept.add_session("kvarn-bf16", ours, first=True)
    kept.add_session("vllm-bf16", theirs, first=True)
    render.render_bars(kept.path.parent)
    table = (kept.path.parent / "bars.md").read_text()
    assert "| decode, batch 1 | bf16 class | ≥ 1 x | 1.2 x | holds |" in table
    assert (
        "| decode, batch 16 | kvarn bf16 (KL within 0.02) against vLLM bf16 | ≥ 1.3 x | 1.17 x | **missed** |" in table
    )
    assert "1 of 3 hold" in table
    missing = "agents, limits, long_context, neighbours, overhead, rounds, served, simulator, step, streaming"
    assert f"Not measured: {missing}." in table


def test_a_share_of_the_limit_counts_what_a_precision_reads_and_in_which_arithmetic_it_multiplies() -> None:
    kept = results.Results("limits", CONDITIONS, merge=False)
    one = session("kvarn int8", [100.0], [2000.0], weights="8-bit")
    for reading in one["readings"]:
        reading["limits"] = [{"read": 40e9, "bf16": 400e9, "int8": 800e9}]
    kept.add_session("kvarn-int8", {"precision": "int8", **one}, first=True)
    kept.data |= {
        "weight_bytes": {"int8": 200e6},
        "prefill_operations": {"512": 512 * 0.2e9},
    }
    kept.save()
    render.render(kept.path)
    table = kept.path.with_suffix(".md").read_text()
    assert "| kvarn int8 | 200 | 100 tokens/s: 50 % | 2,000 tokens/s: 50 % |" in table


def test_what_is_left_beside_a_busy_process_is_a_share_of_the_quiet_speed() -> None:
    kept = results.Results("neighbours", CONDITIONS, merge=False)
    one = session("kvarn bf16", [], [])
    reading = {"size": 1, "quiet": [90.0, 100.0, 110.0], "busy": [40.0, 50.0, 60.0], "foreign_cores": [0.0] * 3}
    kept.add_session("kvarn-bf16", one | {"readings": [reading]}, first=True)
    render.render(kept.path)
    assert "| kvarn bf16 | 100 (90-110) | 50 (40-60) | **0.50** |" in kept.path.with_suffix(".md").read_text()


def test_the_work_of_the_model_is_that_of_its_config() -> None:
    shape = work.shape()
    assert shape.weight_bytes("bfloat16") == 2 * (
        30 * (576 * (576 + 2 * 192) + 576 * 576 + 3 * 576 * 1536) + 49152 * 576
    )
    per_token = shape.prefill_operations(2) - shape.prefill_operations(1)
    assert per_token == 2 * shape.layers * shape.layer_weights + 4 * shape.layers * shape.hidden * 2


def test_memory_of_a_process_tree_counts_its_living_members() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert child.pid in machine.family(os.getpid())
        assert machine.resident_bytes(child.pid) > 0
    finally:
        child.kill()
        child.wait()
    assert machine.resident_bytes(child.pid) == 0


def test_foreign_load_leaves_our_own_work_out() -> None:
    load = machine.ForeignLoad()
    sum(range(3_000_000))
    assert 0.0 <= load.cores() <= machine.describe()["cores"] + 0.5  # type: ignore[operator]


def test_the_real_engine_is_measured_in_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["offline", "--quick", "--only", "kvarn-bf16"])
    offline.main()
    found = json.loads((results.QUICK_FOLDER / "offline.json").read_text())["engines"]["kvarn-bf16"]["sessions"]
    assert "error" not in found[0]
    assert len(found[0]["sample"]) == engines.SAMPLE_TOKENS
    assert [(one["kind"], one["size"]) for one in found[0]["readings"]] == [
        ("decode", 1),
        ("decode", 4),
        ("prefill", 128),
    ]
    assert "written" in capsys.readouterr().out


def test_an_engine_that_is_not_there_is_a_result_not_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.peers.PEERS_DIR", tmp_path)
    monkeypatch.setattr("sys.argv", ["offline", "--quick", "--only", "vllm-bf16"])
    offline.main()
    found = json.loads((results.QUICK_FOLDER / "offline.json").read_text())["engines"]["vllm-bf16"]["sessions"]
    assert "benchmarks.peers install vllm" in found[0]["error"]
