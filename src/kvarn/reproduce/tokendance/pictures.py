"""Pictures of the experiments: figures of cells in, a PNG out. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kvarn.serving.kvcache.mirror_family import predicted_ratio, touched_share
from kvarn.simulation.plots import canvas, save

_COLOURS = {
    "collective": "#2f6690", "batched": "#d1682f", "lego": "#6b8f3a", "serial": "#8a6f9e", "prefix": "#777777",
    "copies": "#e0b34c",
}  # fmt: skip
_BLOCK = 16


def draw_ratios(points: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Draw how much smaller a mirror is over the share computed anew; points: way of choosing -> (share, times)."""
    figure, axis = canvas(1, 1)
    shares = np.linspace(0.005, 0.35, 100)
    axis.plot(shares, [predicted_ratio(0.0, share) for share in shares], color="#2f6690", alpha=0.4, label="1 / r")
    scattered = [predicted_ratio(0.0, touched_share(share, 2 * _BLOCK)) for share in shares]
    axis.plot(shares, scattered, color="#d1682f", alpha=0.4, label="single tokens here and there")
    for name, found in points.items():
        axis.plot(*zip(*sorted(found), strict=True), "o", color=_COLOURS[name], label=f"{name}, measured")
    axis.axhspan(11.2, 17.5, color="#c8cdd2", alpha=0.5, label="published")
    axis.set(title="How much smaller a mirror is, blocks of 16", xlabel="share of shared tokens computed anew (r)",
             ylabel="times", yscale="log")  # fmt: skip
    axis.legend(fontsize="small")
    save(figure, path)


def draw_agents(rates: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw the most agents within the limit over rounds a second, a panel each, a curve for each system."""
    columns = min(2, len(panels))
    figure, axes = canvas(-(-len(panels) // columns), columns)
    for axis, (name, curves) in zip(np.atleast_1d(axes).flat, panels.items(), strict=True):
        for system, agents in curves.items():
            axis.plot(rates, agents, marker="o", color=_COLOURS[system], label=system)
        axis.set(title=name, xscale="log", xlabel="rounds/s", ylabel="agents", ylim=(0, None))
        axis.legend(fontsize="small")
    figure.suptitle("Most agents whose rounds take 1.5 s at P95, simulated")
    save(figure, path)


def draw_restores(mirrors: Sequence[int], ratios: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw how often the fused restore is faster, over the number of mirrors."""
    figure, axis = canvas(1, 1)
    for name, values in ratios.items():
        axis.plot(mirrors, values, marker="o", label=name)
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set(title="Restoring mirrors: fused over another way", xlabel="mirrors", ylabel="times faster", ylim=(0, None))
    axis.legend(fontsize="small")
    save(figure, path)


def draw_divergence(points: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Draw how far answers' likelihoods are from exact ones over the share computed anew; way -> (share, KL)."""
    figure, axis = canvas(1, 1)
    for name, found in points.items():
        axis.plot(*zip(*sorted(found), strict=True), marker="o", label=name)
    axis.set(title="Divergence from exact answers, the real model", xlabel="share of shared tokens computed anew",
             ylabel="KL of the next token, nats", ylim=(0, None))  # fmt: skip
    axis.legend(fontsize="small")
    save(figure, path)
