"""Tables of bursts that want more KV cache than there is, and of the simulator against the engine; see tables.py."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.tables import Lines, Rendered, cell, good, grid, label, machine_line, spread

from kvarn.reproduce.statistics import Estimate, ratio

OURS = "kvarn-streaming"
Burst = dict[str, Any]

FIGURES: dict[str, Callable[[Burst], float]] = {
    "TTFT mean s": lambda burst: burst["ttft"]["mean"],
    "TTFT P50 s": lambda burst: burst["ttft"]["p50"],
    "TTFT P99 s": lambda burst: burst["ttft"]["p99"],
    "tokens/s": lambda burst: burst["output_throughput"],
    "effective tokens/s": lambda burst: burst["effective_throughput"],
    "stalls s a stream": lambda burst: burst["rebuffer"]["mean"],
    "streams that stall %": lambda burst: 100 * burst["stalled_requests"] / burst["requests"],
    "makespan s": lambda burst: burst["makespan"],
    "preemptions": lambda burst: burst["counted"]["preemptions"],
}
RATIOS = ("TTFT mean s", "TTFT P99 s", "tokens/s", "effective tokens/s")


def streaming_table(data: dict[str, Any]) -> Rendered:
    """Rows: servers; columns: latency, throughput, reading (medians over the seeds). Then ratios with intervals."""
    conditions, sessions = data["conditions"], good(data)
    rows = []
    for name, one in sessions.items():
        bursts = bursts_of(one)
        foreign = [burst["foreign_cores"] for burst in bursts]
        failed = sum(burst["requests"] - burst["completed"] for burst in bursts)
        cells = (cell([read(burst) for burst in bursts], foreign) for read in FIGURES.values())
        rows.append([label(name, sessions), *cells, str(failed), str(len(bursts))])
    intro = (
        f"Served, OpenAI completions, streaming: {conditions['requests']} requests at once, "
        f"{conditions['input_tokens']} tokens in and {conditions['output_tokens']} out on average (deviation "
        f"{conditions['deviation']:g}), KV cache of {conditions['kv_tokens']:,} tokens ({conditions['over_commit']:g} "
        f"times as many are wanted), readers of {conditions['stream_rate']:g} tokens/s. bf16, no speculation."
    )
    lines = [intro, "", *grid(["server", *FIGURES, "failed", "seeds"], rows)]
    if OURS in sessions:
        lines += ["", *_ratio_lines(sessions)]
    shown = ("TTFT mean s", "TTFT P99 s", "tokens/s", "effective tokens/s")
    medians = {
        title: {label(name, sessions): median(map(FIGURES[title], bursts_of(one))) for name, one in sessions.items()}
        for title in shown
    }
    return [*lines, "", *server_lines(data)], medians


def ratio_to(sessions: dict[str, list[dict[str, Any]]], other: str, title: str) -> Estimate:
    """Of one figure, streaming over another server, over the seeds that both served."""
    ours, theirs = ({burst["seed"]: FIGURES[title](burst) for burst in bursts_of(sessions[one])}
                    for one in (OURS, other))  # fmt: skip
    seeds = sorted(ours.keys() & theirs.keys())
    return ratio([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])


def bursts_of(sessions: list[dict[str, Any]]) -> list[Burst]:
    return [burst for session in sessions for burst in session["bursts"]]


def simulator_table(data: dict[str, Any]) -> Rendered:
    """Rows: policy and trace; columns: relative error of each figure, simulated over real less one."""
    titles = list(data["rows"][0]["errors"])
    rows = []
    for key in dict.fromkeys((row["policy"], row["trace"]) for row in data["rows"]):
        same = [row for row in data["rows"] if (row["policy"], row["trace"]) == key]
        cells = (spread([100 * row["errors"][title] for row in same]) for title in titles)
        rows.append([*key, *cells, str(len(same))])
    intro = (
        "`kvarn simulate` with a profile of `kvarn calibrate`, against kvarn's server on the same trace: error in %, "
        "median (lowest-highest) over seeds; negative where the simulation is faster."
    )
    return [intro, "", *grid(["policy", "trace", *titles, "seeds"], rows), "", machine_line(data)], {}


def _ratio_lines(sessions: dict[str, list[dict[str, Any]]]) -> Lines:
    rows = []
    for name in sessions:
        if name != OURS:
            cells = (interval(ratio_to(sessions, name, title)) for title in RATIOS)
            rows.append([label(name, sessions), *cells])
    intro = f"{label(OURS, sessions)} over the others, seed by seed: median, and its 95 % interval."
    return [intro, "", *grid(["over", *RATIOS], rows)]


def interval(estimate: Estimate) -> str:
    """A median, and its interval where there is one."""
    value, low, high = estimate
    return f"{value:.2f}" if low != low else f"{value:.2f} ({low:.2f}-{high:.2f})"


def server_lines(data: dict[str, Any]) -> Lines:
    """The machine, the model, and how each server was set up."""
    sessions = good(data)
    lines = [
        f"{machine_line(data)} Median (lowest-highest) over the seeds, which say lengths and prompts. Model "
        f"{data['conditions']['model']}; {data['conditions']['threads']} threads. `*`: other processes used more than "
        "0.15 cores meanwhile.",
        "",
    ]
    for name, one in sessions.items():
        about = one[-1]["about"]
        lines.append(
            f"- {label(name, sessions)}, version {about['version']}: {about['settings']}; {one[-1]['at'][:10]}."
        )
    return lines
