"""Pictures of the experiments: figures of cells in, a PNG out. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvarn.simulation.plots import canvas, save

_COLOURS = {"agentic": "#2f6690", "resident": "#d1682f", "fcfs": "#8a6f9e", "ttl": "#6b8f3a", "min-waste": "#777777"}
_STATES = {
    "active": "#2f6690", "stalled": "#d1682f", "pending": "#e0b34c", "loading": "#6b8f3a", "reserved": "#8a6f9e",
    "cached": "#c8cdd2", "free": "#f1f1f1",
}  # fmt: skip


def draw_latency(rates: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw mean seconds over programs a second, a panel each, a curve for each system."""
    columns = min(4, len(panels))
    figure, axes = canvas(-(-len(panels) // columns), columns)
    for axis, (name, curves) in zip(np.atleast_1d(axes).flat, panels.items(), strict=True):
        for system, seconds in curves.items():
            axis.plot(rates, seconds, marker="o", color=_COLOURS[system], label=system)
        axis.set_title(name, fontsize="medium")
        axis.set(xscale="log", xlabel="programs/s", ylabel="mean seconds", ylim=(0, None))
        axis.legend(fontsize="small")
    figure.suptitle("Mean end-to-end latency, simulated")
    save(figure, path)


def draw_blocks(runs: Mapping[str, Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw KV blocks by state over time, a system each; `runs`: its name -> a cell's series."""
    figure, axes = canvas(len(runs), 1)
    for axis, (name, series) in zip(np.atleast_1d(axes).flat, runs.items(), strict=True):
        axis.stackplot(
            series["times"], [series[state] for state in _STATES], labels=list(_STATES), colors=list(_STATES.values())
        )
        axis.set(title=name, xlabel="seconds", ylabel="KV blocks", xlim=(0, max(s["times"][-1] for s in runs.values())))
        axis.legend(loc="upper right", fontsize="small", ncols=4)
    figure.suptitle(title)
    save(figure, path)


def draw_gaps(gaps: Sequence[float], curves: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw what agentic takes over others, by the median seconds of tool calls."""
    figure, axis = canvas(1, 1)
    for name, ratios in curves.items():
        axis.plot(gaps, ratios, marker="o", label=f"over {name}")
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set(title="Mean end-to-end latency by how long tools take, simulated", xscale="log",
             xlabel="median seconds of a tool call", ylabel="agentic over another")  # fmt: skip
    axis.legend()
    save(figure, path)
