"""`kvarn reproduce tokendance` in small, and what its cells measure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvarn.reproduce.contract import Level, Scope
from kvarn.reproduce.experiment import Cell, Plan
from kvarn.reproduce.tokendance import pictures
from kvarn.reproduce.tokendance.caches import Taken, likeness
from kvarn.reproduce.tokendance.caching import Caches
from kvarn.reproduce.tokendance.experiment import EXPERIMENT
from kvarn.reproduce.tokendance.restores import Restore, restores
from kvarn.reproduce.tokendance.setups import COLLECTIVE, EXACT
from kvarn.reproduce.tokendance.simulated import Capacity, Crowd, Rounds
from kvarn.reproduce.tokendance.trajectories import Trajectories, compared, edit_distance
from kvarn.simulation.rounds.scenarios import Span

ALONE = replace(COLLECTIVE, source="isolated")
SMALL = Caches(ALONE, 3, "seeded", rounds=2, history=64, output=Span(60, 60), private=(0.0,))
CROWD = Crowd("meet-and-greet", qps=4.0, rounds=2, societies=2)


def test_restores_give_rows_and_a_picture(tmp_path: Path) -> None:
    part = restores(Scope("quick"))
    results: dict[Cell, dict[str, Any]] = {}
    for cell in part.cells:
        assert isinstance(cell, Restore)
        results[cell] = replace(cell, repeats=1).run()
    rows = {row.id: row for row in part.rows(results)}
    assert rows["x4.smollm2.n-10"].published == pytest.approx(0.59 / 0.43) and rows["x4.smollm2.n-2"].measured.value > 0
    part.draw(results, tmp_path)
    assert (tmp_path / "restores.png").stat().st_size > 10_000


@pytest.mark.parametrize("level", ["quick", "default", "full"])
def test_every_scope_has_every_part(level: Level) -> None:
    parts = EXPERIMENT.parts(Scope(level))
    assert [part.id for part in parts] == [f"x{number}" for number in range(1, 11)]
    assert all(part.cells for part in parts)
    assert len(Plan.of(EXPERIMENT, Scope(level)).cells) < sum(len(part.cells) for part in parts)


def test_reused_text_is_alike_but_for_what_is_computed_anew_and_copies_are_like_what_they_copy() -> None:
    found = SMALL.run()
    assert found["first_layer"]["16"] == 1.0
    # Three segments of four blocks, of which one is computed anew.
    assert found["others"]["16"] == pytest.approx(11 / 12)
    assert found["stored"]["16/0"]["mean"] == pytest.approx(12 * 30 / 29, rel=0.01)
    assert found["memory"]["shared_blocks"] == 12 + 3
    copies = replace(SMALL, arm=replace(ALONE, share_blocks=False)).run()
    assert copies["others"] == found["others"]
    assert copies["memory"]["shared_blocks"] == 3 * 12


def test_exact_text_is_alike_in_the_first_layer_alone() -> None:
    exact = replace(SMALL, arm=EXACT).run()
    assert exact["first_layer"]["16"] == 1.0 and exact["others"]["16"] == 0.0
    assert exact["stored"]["16/0"]["mean"] == pytest.approx(30 / 29, rel=0.01)


def test_likeness_counts_equal_blocks_of_what_two_have_in_common() -> None:
    rows = np.arange(8 * 2 * 2 * 1 * 4, dtype=np.int16).reshape(8, 2, 2, 1, 4)
    other = rows.copy()
    other[5, 1] += 1
    none = rows[:0]
    texts = ({"a": rows, "b": rows}, {"a": other, "c": rows})
    members = [Taken(none, each, dict.fromkeys(each, 0)) for each in texts]
    assert likeness(members, 4).tolist() == [1.0, 0.5]
    assert likeness([replace(each, sinks=dict.fromkeys("abc", 3)) for each in members], 4).tolist() == [
        1.0,
        pytest.approx(2 / 3),
    ]


def test_more_agents_fit_where_text_is_shared() -> None:
    exact, ours = (Capacity(CROWD, "qwen2-7b", arm, 0.75, most=24) for arm in (EXACT, COLLECTIVE))
    found = [cell.run() for cell in (exact, ours)]
    assert found[0]["agents"] < found[1]["agents"]
    assert found[1]["trials"][f"{found[1]['agents']}"]["p95"] <= 0.75
    again = Rounds(CROWD, found[0]["agents"], "qwen2-7b", EXACT).run()
    assert again["p95"] == found[0]["trials"][f"{found[0]['agents']}"]["p95"]


def test_trajectories_are_repeatable_and_exact_reuse_changes_nothing() -> None:
    base = Trajectories(replace(EXACT, segments=False), ("lost-dog",), agents=2, rounds=2, history=48, output=16)
    [said] = base.run().values()
    assert len(said) == 2 and all(len(each) == 2 for each in said)
    assert compared(said, *replace(base, arm=EXACT).run().values()).identical == 1.0


def test_differences_are_counted_from_the_first_on() -> None:
    one = [[[1, 2], [3]], [[4], [5, 6, 7]]]
    other = [[[1, 2], [3]], [[4], [5, 7]]]
    assert compared(one, one) == compared(other, other)
    found = compared(one, other)
    assert (found.first, found.identical) == (1, 0.75) and found.edits == pytest.approx(1 / 12)
    assert edit_distance([1, 2, 3], [2, 3, 4]) == 2 and edit_distance([], [1, 2]) == 2


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pictures.draw_ratios({"collective": [(0.05, 20.0)], "batched": [(0.15, 1.8)]}, tmp_path / "compression.png")
    pictures.draw_agents((1.0, 8.0), {"7b": {"prefix": [4, 2], "collective": [8, 5]}}, tmp_path / "agents.png")
    pictures.draw_divergence({"blocks": [(0.05, 0.1), (0.5, 0.02)], "lego": [(0.2, 0.05)]}, tmp_path / "divergence.png")
    names = ("compression", "agents", "divergence")
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in names)
