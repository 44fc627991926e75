"""The paper's evaluation and the note's additions, put together: E1 to E14."""

from __future__ import annotations

from typing import Any

from kvarn.reproduce.contract import Scope
from kvarn.reproduce.experiment import Experiment, Part
from kvarn.reproduce.tokencake import latency, mechanisms, memory, robustness
from kvarn.reproduce.tokencake.setups import CONDITIONS, seeds


def _parts(scope: Scope) -> list[Part]:
    return [
        latency.end_to_end(scope), latency.others(scope), memory.utilisation(scope), memory.idle(scope),
        memory.inversions(scope), memory.slowness(scope), mechanisms.transfers(scope), mechanisms.places(scope),
        robustness.forecasts(scope), robustness.ablation(scope), robustness.gaps(scope), mechanisms.deadlock(scope),
        mechanisms.overhead(scope), mechanisms.real_model(scope),
    ]  # fmt: skip


def _conditions(scope: Scope) -> dict[str, Any]:
    quick = {"quick": "Code-Writer alone with 20 programs, 320 blocks; lengths, arrivals and tools' times a quarter"}
    return CONDITIONS | {"seeds": list(seeds(scope))} | (quick if scope.quick else {})


EXPERIMENT = Experiment(
    name="tokencake",
    title="TokenCake: KV of agents that call tools",
    source="arXiv 2510.18586",
    parts=_parts,
    conditions=_conditions,
)
