"""The published mask, for comparison: what its rows see, and that it is the exact one where nothing is reused."""

from __future__ import annotations

import torch

from kvarn.reproduce.contract import Scope
from kvarn.reproduce.tokendance.quality import SELECTIONS, bottom_right, retrieval, selection


def test_rows_behind_a_gap_see_as_if_they_were_the_last_ones() -> None:
    positions = torch.tensor([0, 1, 4, 9, 10, 5, 6, 7], dtype=torch.int32)
    seen = bottom_right(positions, torch.tensor([0, 5, 8], dtype=torch.int32))
    assert seen.tolist() == [0, 1, 8, 9, 10, 5, 6, 7]


def test_every_way_has_a_name_of_its_own_and_is_compared_with_the_usual_one() -> None:
    names = [way.name for way in SELECTIONS]
    assert len(set(names)) == len(names)
    for level in ("quick", "default", "full"):
        for part in (selection(Scope(level)), retrieval(Scope(level))):
            figures = {"mean_kl": 0.1, "top1": 0.9, "perplexity_ratio": 1.1, "needle": 0.5, "questions": 3,
                       "first": 1.0, "refreshed": 0.1, "tokens": 9}  # fmt: skip
            rows = part.rows({cell: {way.name: figures for way in cell.ways} for cell in part.cells})  # type: ignore[attr-defined]
            assert len({row.id for row in rows}) == len(rows) > 3
