"""Systems side by side under one load: which cells that takes, and rows of one system's figures over another's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from kvarn.reproduce.contract import Row
from kvarn.reproduce.experiment import Results
from kvarn.reproduce.statistics import Estimate, level, ratio
from kvarn.reproduce.tokencake.cells import Device, Load, Simulated, System
from kvarn.reproduce.tokencake.setups import OURS, RESIDENT, Panel


@dataclass(frozen=True)
class Contest:
    """One load on one device, by several systems."""

    load: Load
    device: Device
    seeds: tuple[int, ...]
    systems: tuple[System, ...] = (RESIDENT, OURS)

    @property
    def cells(self) -> tuple[Simulated, ...]:
        return tuple(self.cell(system, seed) for system in self.systems for seed in self.seeds)

    def cell(self, system: System, seed: int) -> Simulated:
        return Simulated(self.load, self.device, system, seed)

    def runs(self, results: Results, system: System = OURS) -> list[dict[str, Any]]:
        """Figures, one for each seed."""
        return [results[self.cell(system, seed)] for seed in self.seeds]

    def values(self, results: Results, figure: str, system: System = OURS) -> list[float]:
        return [run[figure] for run in self.runs(results, system)]

    def ratio(
        self, results: Results, system: System = OURS, base: System = RESIDENT, figure: str = "mean_seconds"
    ) -> Estimate:
        return ratio(self.values(results, figure, system), self.values(results, figure, base))

    def over(
        self, results: Results, system: System = OURS, base: System = RESIDENT, *, id: str, what: str, bar: str = "",
        published: float | None = None, note: str = "",
    ) -> Row:  # fmt: skip
        """Mean end-to-end latency of one system over another's; `what`: both, in words."""
        words = [
            f"{median(self.values(results, 'mean_seconds', one)):.4g} over "
            f"{median(self.values(results, 'mean_seconds', other)):.4g} s"
            for one, other in ((system, base),)
        ]
        estimate = self.ratio(results, system, base)
        note = "; ".join(filter(None, (*words, note)))
        return Row(id, f"mean end to end, {what}", "x", estimate, "simulated", published, bar, note)


def contest(panel: Panel, load: Load, seeds: tuple[int, ...], *systems: System) -> Contest:
    """On the panel's device."""
    return Contest(load, panel.device, seeds, systems or (RESIDENT, OURS))


def all_cells(contests: Iterable[Contest]) -> tuple[Simulated, ...]:
    """Of all of them."""
    return tuple(cell for each in contests for cell in each.cells)


def mean_over(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of several panels' figures; the interval says how far panels differ."""
    values = [estimate.value for estimate in estimates]
    return Estimate(fmean(values), *level(values)[1:])


def unequal_work(results: Results, contests: Iterable[Contest], id: str) -> Row:
    """Runs in which other tokens were computed than in the first system's run of the same programs, or some failed."""
    wrong = total = 0
    for each in contests:
        for first, *others in zip(*(each.runs(results, system) for system in each.systems), strict=True):
            total += len(others)
            wrong += sum(run["work"] != first["work"] or run["completed"] < run["programs"] for run in others)
    text = f"runs of {total} that did other work than the baseline, or failed"
    return Row(id, text, "runs", Estimate(wrong), "simulated", None, "= 0")
