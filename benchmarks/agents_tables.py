"""Table of programs of agents on servers that are short of KV cache; see tables.py."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.streaming_tables import interval, server_lines
from benchmarks.tables import Lines, Rendered, cell, good, grid, label

from kvarn.reproduce.statistics import Estimate, ratio

OURS = "kvarn-agentic"
Run = dict[str, Any]

FIGURES: dict[str, Callable[[Run], float]] = {
    "end to end mean s": lambda run: run["mean_seconds"],
    "P50 s": lambda run: run["p50_seconds"],
    "P95 s": lambda run: run["p95_seconds"],
    "makespan s": lambda run: run["makespan"],
    "prompt tokens cached %": lambda run: 100 * run["cached_tokens"] / run["prompt_tokens"],
    "preemptions": lambda run: run["counted"]["preemptions"],
}
RATIOS = ("end to end mean s", "P50 s", "P95 s", "makespan s")


def agents_table(data: dict[str, Any]) -> Rendered:
    """Rows: servers; columns: latency of programs (medians over the seeds). Then ratios with intervals."""
    conditions, sessions = data["conditions"], good(data)
    rows = []
    for name, one in sessions.items():
        runs = runs_of(one)
        foreign = [run["foreign_cores"] for run in runs]
        failed = sum(run["programs"] - run["completed"] for run in runs)
        cells = (cell([read(run) for run in runs], foreign) for read in FIGURES.values())
        rows.append([label(name, sessions), *cells, str(failed), str(len(runs))])
    intro = (
        f"Served, OpenAI completions, streaming: {conditions['programs']} programs of {conditions['app']}, "
        f"{conditions['qps']:g} a second (Poisson), lengths of {conditions['dataset']} times "
        f"{conditions['token_scale']:g}, tools that sleep {conditions['time_scale']:g} times as long as usual, KV "
        f"cache of {conditions['kv_tokens']:,} tokens. bf16. {_work(sessions)}"
    )
    lines = [intro, "", *grid(["server", *FIGURES, "failed", "seeds"], rows)]
    if OURS in sessions:
        lines += ["", *_ratio_lines(sessions)]
    shown = ("end to end mean s", "P95 s", "makespan s")
    medians = {
        title: {label(name, sessions): median(map(FIGURES[title], runs_of(one))) for name, one in sessions.items()}
        for title in shown
    }
    return [*lines, "", *server_lines(data)], medians


def ratio_to(sessions: dict[str, list[dict[str, Any]]], other: str, title: str) -> Estimate:
    """Of one figure, agentic over another server, over the seeds that both served."""
    ours, theirs = ({run["seed"]: FIGURES[title](run) for run in runs_of(sessions[one])} for one in (OURS, other))
    seeds = sorted(ours.keys() & theirs.keys())
    return ratio([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])


def runs_of(sessions: list[dict[str, Any]]) -> list[Run]:
    return [run for session in sessions for run in session["runs"]]


def _work(sessions: dict[str, list[dict[str, Any]]]) -> str:
    """Whether all have done the same."""
    by_seed: dict[int, set[tuple[str, ...]]] = {}
    for one in sessions.values():
        for run in runs_of(one):
            by_seed.setdefault(run["seed"], set()).add(tuple(run["work"]))
    equal = all(len(works) == 1 for works in by_seed.values())
    return "All did the same work, by its digests." if equal else "**Not all did the same work.**"


def _ratio_lines(sessions: dict[str, list[dict[str, Any]]]) -> Lines:
    rows = [
        [label(name, sessions), *(interval(ratio_to(sessions, name, title)) for title in RATIOS)]
        for name in sessions
        if name != OURS
    ]
    intro = f"{label(OURS, sessions)} over the others, seed by seed: median, and its 95 % interval."
    return [intro, "", *grid(["over", *RATIOS], rows)]
