"""The bars that kvarn's speed is held to, each with what was measured and under which condition.

Comes in: the results in a folder. Goes out: a table, one row a bar and condition. A figure that was not measured has
no value; nothing here is typed by hand but the bars themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import agents_tables
from benchmarks.machine_tables import limit_share, memory_beyond, neighbour_rates
from benchmarks.rounds_tables import ratio
from benchmarks.streaming_tables import OURS, ratio_to
from benchmarks.tables import (
    CLASSES,
    MOST_KL,
    Lines,
    good,
    grid,
    label,
    machine_line,
    rates_of,
    ratio_to_best,
    served_figures,
    weights_of,
)

from kvarn.reproduce.contract import sum_up

Results = dict[str, dict[str, Any]]
"""Name of a benchmark -> its results file."""


@dataclass(frozen=True)
class Bar:
    """One comparison with its bar."""

    what: str
    condition: str
    needed: float
    measured: float
    unit: str = "x"
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.measured <= self.needed if self.at_most else self.measured >= self.needed

    def row(self) -> list[str]:
        sign = "≤" if self.at_most else "≥"
        verdict = "holds" if self.holds else "**missed**"
        needed, measured = f"{sign} {self.needed:g} {self.unit}", f"{self.measured:.3g} {self.unit}"
        return [self.what, self.condition, needed, measured, verdict]


def bars_table(folder: Path, allowed: Callable[[str], bool]) -> Lines:
    """All bars that the results in `folder` say something about. `allowed`: see `tables.offline_table`."""
    found: Results = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    bars = [bar for source in SOURCES if source in found for bar in SOURCES[source](found, allowed)]
    missing = sorted(SOURCES.keys() - found.keys())
    lines = grid(["bar", "condition", "needed", "measured", ""], [bar.row() for bar in bars])
    lines += ["", f"{sum(bar.holds for bar in bars)} of {len(bars)} hold. x: times the best other system's figure, "
              "unless the condition says otherwise."]  # fmt: skip
    for path in sorted((folder / "reproduced").glob("*.json")):
        lines += ["", f"`kvarn reproduce {path.stem}`: {sum_up(json.loads(path.read_text())['rows'])}."]
    if missing:
        lines += ["", f"Not measured: {', '.join(missing)}."]
    dates = sorted({session["at"][:10] for data in found.values() for entry in data.get("engines", {}).values()
                    for session in entry["sessions"]})  # fmt: skip
    if dates:
        machine = machine_line(next(data for data in found.values() if "machine" in data))
        lines += ["", f"{machine} {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."]
    return lines


def _offline(found: Results, allowed: Callable[[str], bool]) -> Iterator[Bar]:
    data = found["offline"]
    conditions, sessions = data["conditions"], good(data)
    batches = [("decode", size) for size in conditions["batches"]]
    prefills = [("prefill", size) for size in conditions["prefills"]]
    figures = rates_of(data, batches + prefills)
    names = list(sessions)
    for weights in CLASSES:
        members = [name for name in names if weights_of(sessions[name]) == weights]
        if (ratio := ratio_to_best(figures, ("decode", 1), members, members)) is not None:
            yield Bar("decode, batch 1", f"{weights} class", 1.0, ratio)
    ours = [name for name in names if name.startswith("kvarn") and allowed(name)]
    for column in [one for one in batches if one[1] >= 16] + prefills:
        ratio = ratio_to_best(figures, column, ours, names)
        if ratio is None:
            continue
        best = max((name for name in ours if column in figures[name]), key=lambda name: figures[name][column])
        rival = max(
            (name for name in names if not name.startswith("kvarn") and column in figures[name]),
            key=lambda name: figures[name][column],
        )
        kind, size = column
        what = f"decode, batch {size}" if kind == "decode" else f"prefill, {size} tokens"
        condition = f"{label(best, sessions)} (KL within {MOST_KL}) against {label(rival, sessions)}"
        yield Bar(what, condition, 1.3 if kind == "decode" else 1.2, ratio)


def _long_context(found: Results, allowed: Callable[[str], bool]) -> Iterator[Bar]:
    data = found["long_context"]
    columns = [("decode", size) for size in data["conditions"]["contexts"]]
    figures = rates_of(data, columns)
    for column in columns:
        if (ratio := ratio_to_best(figures, column, figures, figures)) is not None:
            batch = data["conditions"]["batch"]
            yield Bar("long context", f"decode, {batch} sequences of {column[1]:,} tokens", 1.2, ratio)


def _served(found: Results, allowed: Callable[[str], bool]) -> Iterator[Bar]:
    data = found["served"]
    figures = {name: served_figures(sessions) for name, sessions in good(data).items()}
    others = [one for name, one in figures.items() if not name.startswith("kvarn")]
    ours = figures.get("kvarn-auto") or next((one for name, one in figures.items() if name.startswith("kvarn")), None)
    if not others or ours is None:
        return
    burst = f"burst of {data['conditions']['requests']} within {data['conditions']['within']:g} s, defaults"
    yield Bar("served throughput", burst, 1.2, ours["tokens/s"] / max(one["tokens/s"] for one in others))
    for name, title, bar in (("P99 TTFT", "TTFT P99 s", 0.9), ("P99 ITL", "ITL P99 s", 1.0)):
        fastest = max(others, key=lambda one: one["tokens/s"])
        best = min(one[title] for one in others)
        yield Bar(f"served {name}", f"{burst}; lowest of all servers", bar, ours[title] / best, at_most=True)
        if fastest[title] != best:
            yield Bar(f"served {name}", f"{burst}; against the server with most throughput", bar,
                      ours[title] / fastest[title], at_most=True)  # fmt: skip


def _limits(found: Results, allowed: Callable[[str], bool]) -> Iterator[Bar]:
    data = found["limits"]
    sessions = good(data)
    for name in sessions:
        read = 100 * limit_share(data, name, ("decode", 1))
        yield Bar("distance to the limit", f"{label(name, sessions)}: read bandwidth, batch 1", 70, read, "%")
        for tokens in data["conditions"]["prefills"]:
            peak = 100 * limit_share(data, name, ("prefill", tokens))
            condition = f"{label(name, sessions)}: GEMM peak, prefill {tokens} tokens"
            yield Bar("distance to the limit", condition, 60, peak, "%")


def _step(found: Results, allowed: Callable[[str], bool]) -> Iterator[Bar]:
    rows = [row["outside_share"] for row in found["step"]["rows"] if row["batch"] == 32]
    if rows:
        yield Bar("step time outside the forward pass", "batch 32", 8, 100 * median(rows), "%", at_most=True)


def _neighbours(found: Results, allowed: Callable[[str], bool]) -> Iterator[Bar]:
    data = found["neighbours"]
    sessions = good(data)
    for name in (name for name in sessions if name.startswith("kvarn")):
        for batch in data["conditions"]["batches"]:
            quiet, busy, _ = neighbour_rates(sessions[name], batch)
            if busy:
                condition = f"{label(name, sessions)}, decode batch {batch}: times its own quiet speed"
                yield Bar("one core busy elsewhere", condition, 0.45, median(busy) / median(quiet))


def _overhead(found: Results, allowed: Callable[[str], bool]) -> Iterator[Bar]:
    data = found["overhead"]
    sessions = good(data)
    for name, one in sessions.items():
        session, who = one[-1], label(name, sessions)
        ratio = median(session["served"]) / median(session["in_process"])
        yield Bar("served against in process", f"{who}, 32 at a time: times the engine in process", 0.9, ratio)
        yield Bar("start to first token", who, 8, median(session["start_seconds"]), "s", at_most=True)
        yield Bar("memory beyond weights and KV pool", who, 400, memory_beyond(session) / 1e6, "MB", at_most=True)


def _streaming(found: Results, allowed: Callable[[str], bool]) -> Iterator[Bar]:
    data = found["streaming"]
    sessions, asked = good(data), data["conditions"]
    if OURS not in sessions:
        return
    burst = f"{asked['requests']} at once, KV cache for 1/{asked['over_commit']:g} of them"
    for other in ("kvarn-fcfs", "vllm-bf16"):
        if other in sessions:
            first = ratio_to(sessions, other, "TTFT P99 s").value
            yield Bar("streaming, P99 TTFT", f"{burst}; times {label(other, sessions)}", 0.35, first, at_most=True)
    if "kvarn-fcfs" in sessions:
        raw = ratio_to(sessions, "kvarn-fcfs", "tokens/s").value
        yield Bar("streaming, throughput", f"{burst}; times {label('kvarn-fcfs', sessions)}", 0.95, raw)


def _agents(found: Results, _: Callable[[str], bool]) -> Iterator[Bar]:
    data = found["agents"]
    sessions, conditions = good(data), data["conditions"]
    if agents_tables.OURS not in sessions:
        return
    programs = f"{conditions['programs']} programs, {conditions['app']}"
    for other in sessions:
        if other != agents_tables.OURS:
            times = agents_tables.ratio_to(sessions, other, "end to end mean s").value
            condition = f"{programs}; times {label(other, sessions)}"
            yield Bar("agents, mean end to end", condition, 0.8, times, at_most=True)


def _rounds(found: Results, _: Callable[[str], bool]) -> Iterator[Bar]:
    arms = found["rounds"]["arms"]
    if ten := arms.get("10"):
        for other, needed in (("serial", 1.9), ("batched", 1.0), ("recompute", 3.0)):
            yield Bar(
                "rounds, prefill", f"10 agents; times faster than {other}", needed, ratio(ten[other], ten["collective"])
            )
    if within := arms.get("capacity"):
        for name in ("collective", "collective, joint"):
            condition = (
                f"{name}: agents within {found['rounds']['conditions']['slo']:g} s, times those of prefix caching"
            )
            yield Bar("rounds, agents", condition, 2.0, within[name] / within["recompute"])
    if plain := arms.get("plain"):
        times = median(
            b / a for a, b in zip(*(plain["seconds"][arm] for arm in ("recompute", "collective")), strict=True)
        )
        yield Bar("rounds, other traffic", "time with reuse on, times without", 1.02, times, at_most=True)


def _simulator(found: Results, allowed: Callable[[str], bool]) -> Iterator[Bar]:
    rows = found["simulator"]["rows"]
    for policy, trace in dict.fromkeys((row["policy"], row["trace"]) for row in rows):
        same = [row["errors"] for row in rows if (row["policy"], row["trace"]) == (policy, trace)]
        for title in same[0]:
            error = 100 * abs(median(errors[title] for errors in same))
            yield Bar("simulator's error", f"{policy}, {trace}: {title}", 10, error, "%", at_most=True)


SOURCES: dict[str, Callable[[Results, Callable[[str], bool]], Iterator[Bar]]] = {
    "offline": _offline,
    "long_context": _long_context,
    "served": _served,
    "limits": _limits,
    "step": _step,
    "overhead": _overhead,
    "neighbours": _neighbours,
    "streaming": _streaming,
    "agents": _agents,
    "rounds": _rounds,
    "simulator": _simulator,
}
