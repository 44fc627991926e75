"""Pictures of a run: request records or an engine's load in, one PNG, SVG or PDF out.

Needs matplotlib (`pip install 'kvarn[plots]'`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import KvarnError, reason
from kvarn.simulation.report import RequestRecord

_BLUE, _ORANGE = "#2f6690", "#d1682f"


def draw_run(records: Sequence[RequestRecord], path: Path, title: str = "") -> None:
    """Draw TTFT, inter-token gaps, tokens made and requests in flight into `path` (the suffix picks the format)."""
    done = [record for record in records if record.ok]
    if not done:
        raise KvarnError("no request completed, so there is nothing to draw")
    start = min(record.arrival for record in records)
    figure, axes = canvas(2, 2)
    _draw_ttft(axes[0][0], done)
    _draw_gaps(axes[0][1], done)
    _draw_tokens(axes[1][0], done, start)
    _draw_in_flight(axes[1][1], done, start)
    figure.suptitle(title)
    save(figure, path)


def draw_load(load: Mapping[str, NDArray[np.float64]], num_blocks: int, path: Path, title: str = "") -> None:
    """Draw running and waiting requests and the used share of `num_blocks` KV blocks over time into `path`.

    `load` has the columns times (seconds), running, waiting and active_blocks, shape (steps,) each.
    """
    if not len(load["times"]):
        raise KvarnError("the engine computed nothing, so there is nothing to draw")
    figure, axes = canvas(2, 1)
    times = load["times"]
    axes[0].step(times, load["running"], where="post", color=_BLUE, label="running")
    axes[0].step(times, load["waiting"], where="post", color=_ORANGE, label="waiting")
    axes[0].set(title="Requests in the engine", xlabel="seconds", ylabel="requests", ylim=(0, None))
    axes[0].legend(loc="upper right")
    axes[1].fill_between(times, load["active_blocks"] / num_blocks, step="post", color=_BLUE, alpha=0.7)
    axes[1].set(title="KV blocks in use", xlabel="seconds", ylabel="share of the pool", ylim=(0, 1.02))
    figure.suptitle(title)
    save(figure, path)


def running_and_queued(
    records: Sequence[RequestRecord], start: float, points: int = 400
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Seconds since `start`, and how many requests then streamed and how many waited for their first token.

    All of shape (points,). Seen from the client: a request waits from its arrival to its first token.
    """
    done = [record for record in records if record.ok]
    arrivals = np.sort([record.arrival for record in done]) - start
    firsts = np.sort([record.token_times[0] for record in done]) - start
    lasts = np.sort([record.token_times[-1] for record in done]) - start
    moments = np.linspace(0.0, float(lasts[-1]), points)
    arrived, begun, ended = (np.searchsorted(times, moments, side="right") for times in (arrivals, firsts, lasts))
    return moments, begun - ended, arrived - begun


def save(figure: Any, path: Path) -> None:
    """Write a figure into `path`; KvarnError where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise KvarnError(
            f"cannot draw into {path}: {reason(error)}; name a place that can be written (.png, .svg, .pdf)"
        ) from error


def canvas(rows: int, columns: int) -> tuple[Any, Any]:
    """A figure and its axes; KvarnError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise KvarnError("drawing needs matplotlib; install it with: pip install 'kvarn[plots]'") from error
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)


def _draw_ttft(axis: Any, done: Sequence[RequestRecord]) -> None:
    values = np.sort([record.token_times[0] - record.arrival for record in done])
    axis.step(values, np.arange(1, len(values) + 1) / len(values), where="post", color=_BLUE)
    axis.set(title="Time to first token", xlabel="seconds", ylabel="share of requests", ylim=(0, 1.02))
    axis.set_xlim(left=0)


def _draw_gaps(axis: Any, done: Sequence[RequestRecord]) -> None:
    gaps = np.concatenate([np.diff(record.token_times) for record in done]) * 1e3
    if len(gaps):
        # A handful of long gaps would squeeze the rest into one bar; the curve still shows their share.
        edge = float(np.percentile(gaps, 99)) * 1.25 or 1.0
        axis.hist(gaps[gaps <= edge], bins=60, range=(0, edge), color=_BLUE, alpha=0.5)
        share = axis.twinx()
        share.plot(np.sort(gaps), np.arange(1, len(gaps) + 1) / len(gaps), color=_ORANGE)
        share.set(ylabel="share of gaps", ylim=(0, 1.02))
        axis.set_xlim(0, edge)
    axis.set(title="Gaps between tokens", xlabel="milliseconds", ylabel="gaps")


def _draw_tokens(axis: Any, done: Sequence[RequestRecord], start: float) -> None:
    times = np.sort(np.concatenate([record.token_times for record in done])) - start
    axis.plot(times, np.arange(1, len(times) + 1), color=_BLUE)
    axis.set(title="Tokens made", xlabel="seconds", ylabel="output tokens")


def _draw_in_flight(axis: Any, done: Sequence[RequestRecord], start: float) -> None:
    moments, running, queued = running_and_queued(done, start)
    axis.stackplot(moments, running, queued, labels=("streaming", "waiting"), colors=(_BLUE, _ORANGE), alpha=0.7)
    axis.set(title="Requests in flight", xlabel="seconds", ylabel="requests")
    axis.legend(loc="upper right")
