"""What every reproduction promises: its rows, its statistics, and that a run which was killed goes on where it was."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvarn.errors import KvarnError
from kvarn.reproduce.contract import Row, Scope, meets, table
from kvarn.reproduce.experiment import Experiment, Part, Plan, Results
from kvarn.reproduce.statistics import Estimate, difference, level, ratio

# ---- rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "bar", "kept"),
    [
        (0.25, "<= 0.25", True), (0.26, "<= 0.25", False), (1.0, "< 1", False), (1.5, ">= 1.5", True),
        (1.3, "> 1.3", False), (3.0, "= 3", True), (3.01, "= 3", False), (1.0, "0.98 to 1.02", True),
        (1.03, "0.98 to 1.02", False), (math.nan, "<= 1", False), (math.nan, "= 3", False), (math.inf, "<= 1", False),
    ],
)  # fmt: skip
def test_bars_are_kept_or_not(value: float, bar: str, kept: bool) -> None:
    assert meets(value, bar) is kept


def test_a_bar_that_says_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="about 3"):
        meets(1.0, "about 3")


def test_a_row_is_what_the_contract_says() -> None:
    row = Row("e2.a", "P99 TTFT", "x", Estimate(0.2, math.nan, 0.3), "simulated", 0.198, "<= 0.25", "seed 0")
    assert row.to_json() == {
        "id": "e2.a", "metric": "P99 TTFT", "unit": "x", "published": 0.198, "measured": 0.2, "low": None,
        "high": 0.3, "bar": "<= 0.25", "holds": True, "kind": "simulated", "note": "seed 0",
    }  # fmt: skip
    plain = Row("e2.b", "stall", "s", Estimate(math.inf), "real").to_json()
    assert (plain["measured"], plain["bar"], plain["holds"], plain["published"]) == (None, None, None, None)


@pytest.mark.parametrize(("width", "below"), [(None, False), (200, False), (100, False), (66, True)])
def test_a_table_is_cut_by_whole_columns_and_never_wraps(width: int | None, below: bool) -> None:
    row = Row(
        "part.device.conditions.figure",
        "P99 TTFT",
        "s",
        Estimate(0.2, 0.1, 0.3),
        "simulated",
        0.198,
        "<= 0.25",
        "n" * 70,
    )
    shown = Console(width=width or 1000, record=True, file=io.StringIO())
    shown.print(table({"name": "it", "rows": [row.to_json()]}, width))
    lines = [line for line in shown.export_text().splitlines() if line.strip()]
    assert len(lines) == (6 if below else 4)
    assert ("n" * 70 in lines[-1]) == (width in (None, 200)) and ("TTFT" in lines[-1]) == (not below)
    assert "0.1..0.3   <= 0.25 yes" in lines[-1]


# ---- statistics ------------------------------------------------------------------------------------------


def test_the_interval_is_students() -> None:
    """Of 1, 2, 3, 4, 5: mean 3, deviation sqrt(2.5), so 3 -+ 2.776 sqrt(2.5 / 5)."""
    found = level([5.0, 1.0, 3.0, 2.0, 4.0])
    assert found == pytest.approx((3.0, 3 - 2.776 * math.sqrt(0.5), 3 + 2.776 * math.sqrt(0.5)))


def test_ratios_are_paired_by_seed() -> None:
    """Loads differ tenfold, and ours takes half of the time under each: there is nothing uncertain about that."""
    theirs = [1.0, 3.0, 10.0]
    assert ratio([0.5 * one for one in theirs], theirs) == pytest.approx((0.5, 0.5, 0.5))
    assert difference([one - 1 for one in theirs], theirs) == pytest.approx((-1.0, -1.0, -1.0))


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=2, max_size=40))
def test_a_ratio_turned_round_has_its_interval_turned_round(pairs: list[tuple[float, float]]) -> None:
    """Law: which side is divided by which changes nothing but the direction."""
    ours, theirs = zip(*pairs, strict=True)
    there, back = ratio(ours, theirs), ratio(theirs, ours)
    assert there.low == pytest.approx(1 / back.high, rel=1e-6)
    assert there.high == pytest.approx(1 / back.low, rel=1e-6)


def test_ratios_to_nothing_have_no_interval() -> None:
    assert ratio([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])[0] == 1.0
    assert math.isnan(ratio([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]).low)
    assert ratio([1.0, 1.0], [0.0, 0.0])[0] == math.inf
    assert math.isnan(level([4.0]).low)


# ---- running ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Square:
    """A cell that leaves a line in a log each time it runs."""

    number: int
    log: str
    alone: bool = True
    cost: float = 1.0

    def run(self) -> dict[str, Any]:
        with Path(self.log).open("a") as file:
            file.write(f"{self.number}\n")
        return {"square": self.number**2}


def _experiment(*cells: Square) -> Experiment:
    def part(id: str, cells: tuple[Square, ...]) -> Part:
        def rows(results: Results) -> list[Row]:
            return [Row(f"{one.number}", "square", "", Estimate(results[one]["square"]), "model") for one in cells]

        return Part(id, id, cells, rows)

    parts = [part("a", cells[:1]), part("b", cells)]
    return Experiment("squares", "Squares", "nowhere", lambda scope: parts, lambda scope: {"colour": "blue"})


@pytest.mark.parametrize("alone", [False, True])
def test_every_cell_runs_once_whatever_needs_it(tmp_path: Path, alone: bool) -> None:
    log = tmp_path / "log"
    cells = [Square(number, str(log), alone) for number in range(4)]
    heard: list[None] = []
    document = Plan.of(_experiment(*cells), Scope("quick", 3)).run(on_done=lambda: heard.append(None))
    assert sorted(log.read_text().split()) == ["0", "1", "2", "3"]
    assert [row["measured"] for row in document["rows"]] == [0, 0, 1, 4, 9]
    assert set(document) == {"name", "hardware", "conditions", "rows"}
    assert document["conditions"]["seeds"] == [3, 4] and document["conditions"]["colour"] == "blue"
    assert len(heard) == 4


def test_only_the_parts_named_run(tmp_path: Path) -> None:
    experiment = _experiment(*(Square(number, str(tmp_path / "log")) for number in range(4)))
    assert len(Plan.of(experiment, Scope(), ["a"]).run()["rows"]) == 1
    assert (tmp_path / "log").read_text() == "0\n"
    with pytest.raises(KvarnError, match="a, b"):
        Plan.of(experiment, Scope(), ["c"])


def test_cells_of_other_conditions_are_other_cells(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    for number in (1, 2, 1):
        Plan.of(_experiment(Square(number, log)), Scope()).run(tmp_path / "out")
    assert Path(log).read_text() == "1\n2\n"


_KILLED = """
import os, signal
from dataclasses import dataclass
from pathlib import Path

from kvarn.reproduce.contract import Scope
from kvarn.reproduce.experiment import Plan
from tests.reproduce.test_experiment import Square, _experiment


@dataclass(frozen=True)
class Deadly(Square):
    def run(self):
        if not Path(self.log + ".killed").exists():
            Path(self.log + ".killed").touch()
            os.kill({victim}, signal.SIGKILL)
        return super().run()


if __name__ == "__main__":
    cells = [Square(0, {log!r}, {alone}, 9.0), Deadly(1, {log!r}, {alone}, 5.0), Square(2, {log!r}, {alone}, 1.0)]
    print(Plan.of(_experiment(*cells), Scope()).run(Path({out!r}))["rows"][-1]["measured"])
"""


def _run_script(tmp_path: Path, *, alone: bool, victim: str) -> subprocess.CompletedProcess[str]:
    """Ends when every process that it started has closed its end of the pipe."""
    log, out, script = str(tmp_path / "log"), str(tmp_path / "out"), tmp_path / "script.py"
    script.write_text(_KILLED.format(log=log, out=out, alone=alone, victim=victim))
    root = Path(__file__).parents[2]
    source = f"import sys; sys.path[:0] = [{str(root / 'src')!r}, {str(root)!r}]\n"
    script.write_text(source + script.read_text())
    return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    killed = _run_script(tmp_path, alone=True, victim="os.getpid()")
    assert killed.returncode == -9
    assert not (tmp_path / "out" / "report.json").exists()
    resumed = _run_script(tmp_path, alone=True, victim="os.getpid()")
    assert resumed.stdout == "4\n", resumed.stderr
    assert (tmp_path / "log").read_text() == "0\n1\n2\n"
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["rows"]) == 4


def test_workers_end_with_a_run_that_was_killed(tmp_path: Path) -> None:
    """Else the pipe would stay open, and waiting for it run into its timeout."""
    assert _run_script(tmp_path, alone=False, victim="os.getppid()").returncode == -9
    assert _run_script(tmp_path, alone=False, victim="os.getppid()").stdout == "4\n"


def test_a_worker_that_dies_ends_the_run_in_words_and_keeps_what_is_done(tmp_path: Path) -> None:
    died = _run_script(tmp_path, alone=False, victim="os.getpid()")
    assert died.returncode == 1
    assert "KvarnError: a worker process died" in died.stderr
    assert _run_script(tmp_path, alone=False, victim="os.getpid()").stdout == "4\n"


def test_a_damaged_cell_is_measured_again(tmp_path: Path) -> None:
    plan = Plan.of(_experiment(Square(3, str(tmp_path / "log"))), Scope())
    plan.run(tmp_path / "out")
    for cell in (tmp_path / "out" / "cells").iterdir():
        cell.write_text(cell.read_text()[:5])
    assert plan.run(tmp_path / "out")["rows"][0]["measured"] == 9
    assert (tmp_path / "log").read_text() == "3\n3\n"
