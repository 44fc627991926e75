"""Policies side by side under one load: which cells that takes, and rows of one policy's figures over another's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from kvarn.reproduce.contract import Row
from kvarn.reproduce.experiment import Results
from kvarn.reproduce.statistics import Estimate, difference, level, ratio
from kvarn.reproduce.tokenflow.cells import Device, Load, Simulated, Switches
from kvarn.serving.config import PolicyName

OURS: PolicyName = "streaming"
BASELINE: PolicyName = "fcfs-conservative"
"""First come, first served, with everything reserved before: nobody is taken off the device."""
GREEDY: PolicyName = "fcfs"
"""With as many as fit now; who came last gives way when blocks are short, and computes everything again."""
FIGURES: dict[str, tuple[str, str]] = {
    "ttft_mean": ("mean TTFT", "s"),
    "ttft_p50": ("median TTFT", "s"),
    "ttft_p99": ("P99 TTFT", "s"),
    "effective": ("effective throughput", "tokens/s"),
    "raw": ("raw throughput", "tokens/s"),
    "stall_mean": ("stall per stream", "s"),
    "stall_p99": ("P99 stall of a stream", "s"),
    "stalled_share": ("streams that stall", "share"),
    "speed": ("median speed of a stream", "tokens/s"),
    "e2el_mean": ("mean time to the last token", "s"),
    "makespan": ("makespan", "s"),
    "preemptions": ("preemptions", "count"),
    "completed": ("requests served", "count"),
}
"""Name -> what it is called, and its unit."""


@dataclass(frozen=True)
class Contest:
    """One load on one device, by several policies."""

    load: Load
    device: Device
    seeds: tuple[int, ...]
    policies: tuple[PolicyName, ...] = (BASELINE, GREEDY, OURS)
    switches: Switches = field(default=Switches())
    """Of ours."""
    pictured: bool = False
    """Whether the first seed's runs are drawn."""

    def cell(self, policy: PolicyName, seed: int) -> Simulated:
        switches = self.switches if policy == OURS else Switches()
        return Simulated(self.load, self.device, policy, seed, switches, self.pictured and seed == self.seeds[0])

    @property
    def cells(self) -> tuple[Simulated, ...]:
        return tuple(self.cell(policy, seed) for policy in self.policies for seed in self.seeds)

    def values(self, results: Results, figure: str, policy: PolicyName = OURS) -> list[float]:
        """One for each seed."""
        return [results[self.cell(policy, seed)][figure] for seed in self.seeds]

    def pictured_runs(self, results: Results) -> dict[PolicyName, dict[str, Any]]:
        """The first seed's run of each policy, to be drawn."""
        return {policy: results[self.cell(policy, self.seeds[0])] for policy in self.policies}

    def over(
        self,
        results: Results,
        figure: str,
        against: PolicyName = BASELINE,
        *,
        id: str,
        bar: str = "",
        published: float | None = None,
        note: str = "",
    ) -> Row:
        """Our figure over another policy's.

        Stalls are compared by their difference in seconds: a policy without any has no ratio to itself.
        """
        ours, theirs = self.values(results, figure), self.values(results, figure, against)
        text, unit = FIGURES[figure]
        absolute = figure.startswith("stall")
        estimate = difference(ours, theirs) if absolute else ratio(ours, theirs)
        words = f"{median(ours):.3g} {'less' if absolute else 'over'} {median(theirs):.3g} {unit}"
        return Row(
            id=id if against == BASELINE else f"{id}.vs-{against}",
            metric=f"{text}, {'difference' if absolute else 'ratio'} to {against}",
            unit=unit if absolute else "x",
            measured=estimate,
            kind="simulated",
            published=published,
            bar=bar,
            note="; ".join(filter(None, (words, note))),
        )

    def row(self, results: Results, figure: str, policy: PolicyName = OURS, *, id: str, bar: str = "",
            published: float | None = None, note: str = "") -> Row:  # fmt: skip
        """A figure by itself."""
        text, unit = FIGURES[figure]
        estimate = level(self.values(results, figure, policy))
        return Row(id, f"{text}, {policy}", unit, estimate, "simulated", published, bar, note)


def all_cells(contests: Iterable[Contest]) -> tuple[Simulated, ...]:
    """Of all of them."""
    return tuple(cell for contest in contests for cell in contest.cells)


def qos(results: Results, cells: Sequence[Simulated], waiting: float, stalling: float) -> Estimate:
    """Eq. 2 of the paper: effective tokens less `waiting` a second of TTFT and `stalling` a second of stall, over time.

    In tokens per second; the weights (lambda and mu, tokens per second of waiting) are nowhere in the paper.
    """
    found = [results[cell] for cell in cells]
    return level(
        [
            (one["effective_tokens"] - one["completed"] * (waiting * one["ttft_mean"] + stalling * one["stall_mean"]))
            / one["makespan"]
            for one in found
        ]
    )
