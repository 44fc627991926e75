"""X4: restoring mirrors into the pool in one pass, against making them dense first."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvarn.reproduce.contract import Row, Scope
from kvarn.reproduce.experiment import Part, Results
from kvarn.reproduce.statistics import Estimate
from kvarn.reproduce.tokendance import pictures

_SHAPES = {"smollm2": 0, "7b": 1}
_PUBLISHED = {10: 0.59 / 0.43}
_BARS = {2: ">= 1.3", 10: ">= 2.0"}


@dataclass(frozen=True)
class Restore:
    """The cell: so many mirrors, three ways in turn."""

    shape: str
    mirrors: int
    repeats: int

    alone = True

    @property
    def cost(self) -> float:
        return float(self.mirrors)

    def run(self) -> dict[str, Any]:
        import torch

        from kvarn.bench.restores import SHAPES, measured

        with torch.inference_mode():
            return asdict(measured(SHAPES[_SHAPES[self.shape]], self.mirrors, self.repeats))


def restores(scope: Scope) -> Part:
    """X4."""
    mirrors = (2, 10) if scope.quick else (2, 4, 6, 8, 10)
    repeats = {"quick": 5, "default": 25, "full": 75}[scope.level]
    cells = {
        (shape, count): Restore(shape, count, repeats)
        for shape in (("smollm2",) if scope.quick else _SHAPES)
        for count in mirrors
    }

    def rows(results: Results) -> list[Row]:
        made = []
        for (shape, count), cell in cells.items():
            found = results[cell]
            text = f"dense over fused, {count} mirrors of 40 blocks, 3 of them their own"
            made += [
                Row(f"x4.{shape}.n-{count}", text, "x", Estimate(found["over_dense"]), "real", _PUBLISHED.get(count),
                    _BARS.get(count, ""), f"{found['fused_ms']:.1f} ms for {found['written_mib']:.0f} MiB"),
                Row(f"x4.{shape}.n-{count}.materialised", "whole blocks first and the same kernel, over fused", "x",
                    Estimate(found["over_materialised"]), "real"),
            ]  # fmt: skip
        return made

    def draw(results: Results, folder: Path) -> None:
        ratios = {
            f"{shape}, over {name}": [results[cells[shape, count]][f"over_{name}"] for count in mirrors]
            for shape in dict.fromkeys(shape for shape, _ in cells)
            for name in ("dense", "materialised")
        }
        pictures.draw_restores(mirrors, ratios, folder / "restores.png")

    return Part("x4", "Restoring mirrors", tuple(cells.values()), rows, draw)
