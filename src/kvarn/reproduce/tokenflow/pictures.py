"""Pictures of the experiments: figures of cells in, a PNG out. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kvarn.reproduce.statistics import Estimate
from kvarn.reproduce.tokenflow.contest import BASELINE, OURS
from kvarn.serving.config import PolicyName
from kvarn.simulation.plots import canvas, save

_COLOURS: dict[PolicyName, str] = {
    "streaming": "#2f6690", "fcfs-conservative": "#d1682f", "fcfs": "#8a6f9e", "fcfs-paced": "#6b8f3a",
    "qoe-recompute": "#777777",
}  # fmt: skip


def draw_burst(runs: Mapping[PolicyName, dict[str, Any]], path: Path, title: str) -> None:
    """Draw TTFTs, buffers, and running and waiting requests of runs of one load, by policy."""
    figure, axes = canvas(2, 2)
    for policy, run in runs.items():
        waits = run["series"]["ttft"]
        shares = np.arange(1, len(waits) + 1) / len(waits)
        axes[0][0].step(waits, shares, where="post", color=_COLOURS[policy], label=policy)
    axes[0][0].set(title="Time to first token", xlabel="seconds", ylabel="share of requests", ylim=(0, 1.02))
    axes[0][0].set_xscale("symlog", linthresh=1.0)
    axes[0][0].set_xlim(left=0)
    for policy in (OURS, BASELINE):
        series, colour = runs[policy]["series"], _COLOURS[policy]
        axes[0][1].plot(series["times"], series["slack_p50"], color=colour, label=f"{policy}, median, 10 to 90 %")
        axes[0][1].fill_between(series["times"], series["slack_p10"], series["slack_p90"], color=colour, alpha=0.2)
        axes[1][0].step(series["times"], series["running"], where="post", color=colour, label=policy)
        axes[1][1].step(series["times"], series["waiting"], where="post", color=colour, label=policy)
    axes[0][1].set(title="What streams have left to read", xlabel="seconds", ylabel="seconds of text")
    axes[1][0].set(title="Requests on the device", xlabel="seconds", ylabel="requests", ylim=(0, None))
    axes[1][1].set(title="Requests waiting: new, or moved to the host", xlabel="seconds", ylabel="requests")
    for axis in axes.flat:
        axis.legend(fontsize="small")
    figure.suptitle(title)
    save(figure, path)


def draw_ablation(times: Mapping[str, Estimate], path: Path, title: str) -> None:
    """Draw a bar with its interval for every switch, as multiples of the full method."""
    figure, axis = canvas(1, 1)
    names = list(times)
    values = np.array([times[name] for name in names])
    reach = np.nan_to_num(np.abs(values[:, 1:].T - values[:, 0]))
    axis.barh(names[::-1], values[::-1, 0], xerr=reach[:, ::-1], color=_COLOURS[OURS], alpha=0.8)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set(title=title, xlabel="multiple of the full method")
    save(figure, path)
