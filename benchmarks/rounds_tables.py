"""The tables of `benchmarks.rounds`: times of each arm by number of agents, and what the parts of reuse are worth."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks import tables

PARTS = (
    ("batching alone", "serial", "batched"),
    ("one choice of blocks", "batched", "collective, alone"),
    ("encoding together", "collective, alone", "collective, joint"),
    ("one copy for all", "collective, joint", "collective"),
    ("all of it", "serial", "collective"),
    ("against prefix caching", "recompute", "collective"),
)
"""What is told apart: the arm without it, and with it."""


def rounds_table(data: dict[str, Any]) -> tables.Rendered:
    """Prefill of a round in ms, ratios within repeats, and the most agents within the limit."""
    conditions, engines = data["conditions"], dict(data["arms"])
    capacity: dict[str, int] = engines.pop("capacity", {})
    plain: dict[str, Any] = engines.pop("plain", {})
    sizes = [f"{size} agents" for size in engines]
    arms = list(next(iter(engines.values())))
    intro = (
        f"Round prefill in ms: all requests there, to the last first token (median, spread). {conditions['history']} "
        f"cached tokens of history, {conditions['fresh']} new ones, {conditions['output']} tokens of output from each "
        f"agent, a task of {conditions['task']}. Computed anew: {conditions['share']:.0%} of shared tokens where "
        f"segments are encoded alone, {conditions['joint_share']:.0%} of blocks where together."
    )
    rows = [
        [
            arm,
            *(tables.spread([seconds * 1e3 for seconds in found[arm]["prefill"]]) for found in engines.values()),
            str(capacity.get(arm, "")),
        ]
        for arm in arms
    ]
    limit = f"agents within {conditions['slo']:g} s"
    shares = [
        [name, *(f"{ratio(found[without], found[with_]):.2f}x" for found in engines.values())]
        for name, without, with_ in PARTS
        if without in arms and with_ in arms
    ]
    lines = [
        intro, "", *tables.grid(["arm", *sizes, limit], rows), "",
        "How often faster, by part (medians of ratios within repeats):", "", *tables.grid(["", *sizes], shares),
    ]  # fmt: skip
    if plain:
        taken = plain["seconds"]
        times = median(b / a for a, b in zip(taken["recompute"], taken["collective"], strict=True))
        said = "the same tokens" if plain["same_tokens"] else "**other tokens**"
        lines += ["", f"Requests without rounds, with reuse on: {times:.3f} times the time, {said}."]
    bars = {
        size: {arm: median(found[arm]["prefill"]) for arm in arms}
        for size, found in zip(sizes, engines.values(), strict=True)
    }
    return lines, bars


def ratio(without: dict[str, list[float]], with_: dict[str, list[float]]) -> float:
    """Of the prefill of two arms, repeat by repeat."""
    return median(a / b for a, b in zip(without["prefill"], with_["prefill"], strict=True))
