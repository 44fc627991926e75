"""`kvarn calibrate` on the real engine, cut short, and its profile in `kvarn simulate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvarn.cli.main import app
from kvarn.hardware.accelerators import load_accelerator
from kvarn.simulation import calibration
from kvarn.simulation.calibration import Round


def test_a_profile_of_this_machine_can_be_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = (*(Round(requests, 24, 4) for requests in (1, 4, 16)), Round(1, 8, 1), Round(2, 100, 9, ((24, 30),)))
    monkeypatch.setattr(calibration, "WARM_UP", ())
    monkeypatch.setattr(calibration, "PLAN", plan)
    profile = tmp_path / "profile.toml"
    outcome = CliRunner().invoke(app, ["calibrate", "--output", str(profile), "--json"])
    assert outcome.exit_code == 0, outcome.output
    report = json.loads(outcome.stdout)
    assert report["steps"] == 2 * (3 * 4 + 1 + 9)
    sorts = {each["name"]: each["steps"] for each in report["regimes"]}
    assert sorts["prompts beside them"] == 2
    assert sum(sorts.values()) == report["steps"]
    assert "compute_share" in report["fitted"]
    device = load_accelerator(str(profile))
    assert "smollm2" in device.title.lower()
    arguments = ["--hardware", str(profile), "--model", "smollm2", "--workload", "burst:4", "--output-tokens", "8"]
    simulated = CliRunner().invoke(app, ["simulate", *arguments, "--kv-memory", "64MiB"])
    assert simulated.exit_code == 0, simulated.output
    assert "4 of 4 completed" in simulated.output
