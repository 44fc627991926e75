"""`kvarn reproduce tokencake` in small, and what its cells measure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvarn.cli.main import app
from kvarn.reproduce.contract import Level, Scope
from kvarn.reproduce.experiment import Plan
from kvarn.reproduce.tokencake import pictures
from kvarn.reproduce.tokencake.cells import Device, Load, Simulated, System, slow_turns
from kvarn.reproduce.tokencake.contest import Contest, unequal_work
from kvarn.reproduce.tokencake.copying import ReturnDelay, Transfer
from kvarn.reproduce.tokencake.deadlock import Deadlock
from kvarn.reproduce.tokencake.experiment import EXPERIMENT
from kvarn.reproduce.tokencake.policy_cost import PolicyCost
from kvarn.reproduce.tokencake.real_model import RealModel
from kvarn.reproduce.tokencake.setups import OURS, RESIDENT, STOCK
from kvarn.simulation.agents.workload import Forecasts

TINY = Device("a100-80", "qwen2.5-14b", blocks=60, host_gigabytes=10)
LOAD = Load("code-writer", "d1", 6, 8.0, stretch=0.2, token_scale=0.06)


def test_a_quick_part_gives_rows_and_keeps_them(tmp_path: Path) -> None:
    arguments = ["reproduce", "tokencake", "--quick", "--only", "e7,e12", "--output", str(tmp_path), "--json"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    document = json.loads(outcome.stdout)
    rows = {row["id"]: row for row in document["rows"]}
    assert rows["e12.finished"]["measured"] == 2 and rows["e12.finished"]["holds"]
    assert rows["e7.1024.gain"]["published"] == pytest.approx(2211 / 12)
    assert json.loads((tmp_path / "tokencake" / "report.json").read_text()) == document
    assert len(document["conditions"]["seeds"]) == 1


@pytest.mark.parametrize("level", ["quick", "default", "full"])
def test_every_scope_has_every_part(level: Level) -> None:
    parts = EXPERIMENT.parts(Scope(level))
    assert [part.id for part in parts] == [f"e{number}" for number in range(1, 15)]
    assert all(part.cells for part in parts)


def test_parts_share_cells() -> None:
    parts = EXPERIMENT.parts(Scope())
    assert len(Plan.of(EXPERIMENT, Scope()).cells) < sum(len(part.cells) for part in parts) - 20


def test_the_same_cell_gives_the_same_figures_and_others_do_the_same_work() -> None:
    contest = Contest(LOAD, TINY, (0,), (RESIDENT, STOCK, OURS))
    results = {cell: cell.run() for cell in contest.cells}
    ours = Simulated(LOAD, TINY, OURS, 0)
    assert json.loads(json.dumps(ours.run())) == results[ours]
    assert unequal_work(results, [contest], "x").measured.value == 0  # type: ignore[arg-type]
    assert sum(results[ours]["shares"].values()) == pytest.approx(1.0)
    assert results[ours]["stalls"]["offloads"] > 0 == results[Simulated(LOAD, TINY, RESIDENT, 0)]["stalls"]["offloads"]
    assert "stalls" not in results[Simulated(LOAD, TINY, STOCK, 0)]
    other = Simulated(LOAD, TINY, STOCK, 1)
    wrong = results | {Simulated(LOAD, TINY, STOCK, 0): other.run()}
    assert unequal_work(wrong, [contest], "x").measured.value == 1  # type: ignore[arg-type]


def test_loads_differ_in_what_they_say() -> None:
    base, longer = (replace(LOAD, stretch=stretch).workload(0).durations for stretch in (1.0, 3.0))
    assert longer.typical("search") == pytest.approx(3 * base.typical("search"))
    cells = [Simulated(replace(LOAD, forecasts=Forecasts(error=error)), TINY) for error in (0.0, 2.0)]
    assert cells[0] != cells[1] and len(set(cells)) == 2


def test_slow_turns_are_counted_against_a_mean_that_may_be_another_systems() -> None:
    turns = {"judge": [1.0, 1.0, 4.0], "final": [1.0, 1.0, 1.0]}
    assert slow_turns(turns, turns) == {"judge": 1, "final": 0}
    assert slow_turns(turns, {"judge": [3.0], "final": [0.5]}) == {"judge": 0, "final": 3}


def test_copies_take_bytes_over_bandwidth() -> None:
    found = Transfer("a100-80", "qwen2.5-14b", 100).run()
    assert found["offload"] == pytest.approx(100 * 3 * 2**20 / 25e9)
    assert found["recompute"] > 5 * (found["offload"] + found["upload"])


def test_blocks_reserved_step_by_step_are_there_in_time() -> None:
    gradual, at_once = (ReturnDelay(gradual, 40, 0).run()["late"] for gradual in (True, False))
    assert max(gradual) < 20 < max(at_once)


@pytest.mark.parametrize("policy", ["agentic", "fcfs"])
def test_two_that_come_back_and_do_not_fit_together_both_finish(policy: str) -> None:
    found = Deadlock(policy).run()  # type: ignore[arg-type]
    assert found["finished"] == 2 and found["from_host"] == 256 and found["on_device"] == 0
    assert found["blocks"] == 20


def test_a_crowd_is_as_large_as_is_said() -> None:
    found = PolicyCost(60, 20, 10, 0.3, 0).run()
    assert found["stalled"] == 10 and found["running"] > 15 and found["waiting"] > 45
    assert 0 < found["mean"] <= found["metered"]


def test_a_real_model_says_the_same_when_its_kv_is_moved() -> None:
    found = RealModel(4, 4, 1).run()
    assert found["differing"] == 0 and found["offloads"] > 0
    assert found["tokens"] == 16 * (4 * 5 - 1)  # one agent is closed before its last answer


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pictures.draw_latency((0.1, 1.0), {"a": {"resident": [1, 2], "agentic": [1, 1]}}, tmp_path / "latency.png")
    series = Simulated(LOAD, TINY, System(options=("like=resident",), host=False)).run()["series"]
    pictures.draw_blocks({"resident": series, "agentic": series}, tmp_path / "blocks.png", "Blocks")
    pictures.draw_gaps((1.0, 10.0), {"ttl": [1.0, 0.8]}, tmp_path / "gaps.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in ("latency", "blocks", "gaps"))
