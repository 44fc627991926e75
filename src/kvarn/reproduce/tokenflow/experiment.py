"""The paper's evaluation, put together: E0 to E10."""

from __future__ import annotations

from typing import Any

from kvarn.reproduce.contract import Scope
from kvarn.reproduce.experiment import Experiment, Part
from kvarn.reproduce.tokenflow import mechanisms, pressure, readers
from kvarn.reproduce.tokenflow.setups import CONDITIONS


def _parts(scope: Scope) -> list[Part]:
    return [
        mechanisms.example(scope), pressure.motivation(scope), pressure.bursts(scope), pressure.streams(scope),
        pressure.traces(scope), readers.mixed_rates(scope), readers.faster_readers(scope), readers.knobs(scope),
        mechanisms.ablation(scope), mechanisms.overhead(scope), readers.beyond(scope),
    ]  # fmt: skip


def _conditions(scope: Scope) -> dict[str, Any]:
    quick = {"quick": "two seeds; one device in e1, e3 to e7 and e10; shorter streams; h200-short in place of h200"}
    return CONDITIONS | (quick if scope.quick else {})


EXPERIMENT = Experiment(
    name="tokenflow",
    title="TokenFlow: serving streams just in time under bursts",
    source="arXiv 2510.02758",
    parts=_parts,
    conditions=_conditions,
)
