"""A picture of programs over time: records of a run in, one PNG, SVG or PDF out. Needs matplotlib."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

from kvarn.errors import KvarnError
from kvarn.simulation.agents.report import AgentRun
from kvarn.simulation.plots import canvas, save

_COLORS = {"waits": "#c9ced6", "is answered": "#2f6690", "tool": "#d1682f"}
_MOST_PROGRAMS = 24

_Bar = tuple[float, float, float]
"""Beginning, first token, end; a tool's first token is -1."""


def draw_timelines(run: AgentRun, path: Path, title: str = "") -> None:
    """Draw what each of the first programs did when: model calls (waiting, then answered) and tools, side by side."""
    programs = sorted(run.programs, key=lambda record: (record.arrival, record.id))[:_MOST_PROGRAMS]
    if not run.calls:
        raise KvarnError("no model call was made, so there is nothing to draw")
    figure, axes = canvas(1, 1)
    bottom, ticks = 0, []
    for record in programs:
        bars: list[_Bar] = [
            (call.ready, call.first_token or call.end, call.end) for call in run.calls if call.program == record.id
        ]
        bars += [(tool.start, -1.0, tool.end) for tool in run.tools if tool.program == record.id]
        lanes = _draw_lanes(axes, sorted(bars), bottom)
        axes.plot([record.end, record.end], [bottom, bottom + lanes], color="black", linewidth=1)
        ticks.append(bottom + lanes / 2)
        bottom += lanes + 1
    for label, color in _COLORS.items():
        axes.barh(-10, 0, color=color, label=label if label == "tool" else f"model call {label}")
    axes.set(xlabel="seconds", ylim=(bottom, -0.5), xlim=(0, None))
    axes.set_yticks(ticks, [record.id for record in programs], fontsize=7)
    figure.legend(loc="outside lower center", ncols=3)
    figure.suptitle(title)
    save(figure, path)


def _draw_lanes(axis: Any, bars: list[_Bar], bottom: int) -> int:
    """Lay bars that overlap side by side; returns the lanes it took."""
    free: list[tuple[float, int]] = []
    lanes = 0
    for start, first, end in bars:
        if free and free[0][0] <= start + 1e-9:
            lane = heapq.heappop(free)[1]
        else:
            lane, lanes = lanes, lanes + 1
        heapq.heappush(free, (end, lane))
        place = bottom + lane + 0.5
        if first < 0:
            axis.barh(place, end - start, left=start, height=0.8, color=_COLORS["tool"])
        else:
            axis.barh(place, first - start, left=start, height=0.8, color=_COLORS["waits"])
            axis.barh(place, end - first, left=first, height=0.8, color=_COLORS["is answered"])
    return max(1, lanes)
