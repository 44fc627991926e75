"""The paper's evaluation and the note's additions, put together: X1 to X10."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvarn.reproduce.contract import Scope
from kvarn.reproduce.experiment import Experiment, Part, Results
from kvarn.reproduce.tokendance import (
    capacity,
    pictures,
    prefill,
    quality,
    restores,
    sensitivity,
    storage,
    trajectories,
)
from kvarn.reproduce.tokendance.setups import CONDITIONS, seeds


def _parts(scope: Scope) -> list[Part]:
    return [
        storage.redundancy(scope), storage.compression(scope), prefill.prefill(scope), restores.restores(scope),
        capacity.agents(scope), storage.memory(scope), _with_curves(quality.selection(scope)),
        trajectories.trajectories(scope), quality.retrieval(scope), sensitivity.sensitivity(scope),
    ]  # fmt: skip


def _with_curves(part: Part) -> Part:
    """With a picture of its one cell."""
    [cell] = part.cells

    def draw(results: Results, folder: Path) -> None:
        points: dict[str, list[tuple[float, float]]] = {}
        for way, figures in results[cell].items():
            kind = re.sub(r"\.[\d.]+$", "", way)
            points.setdefault(kind, []).append((figures["refreshed"], figures["mean_kl"]))
        pictures.draw_divergence(points, folder / "divergence.png")

    return replace(part, draw=draw)


def _conditions(scope: Scope) -> dict[str, Any]:
    quick = {"quick": "four agents, two or three rounds, one device and model: bars that need ten agents are not there"}
    return CONDITIONS | {"seeds": list(seeds(scope))} | (quick if scope.quick else {})


EXPERIMENT = Experiment(
    name="tokendance",
    title="TokenDance: agents that read the same texts in rounds",
    source="arXiv 2604.03143",
    parts=_parts,
    conditions=_conditions,
)
