"""Turn results into what the documentation shows: NAME.json -> NAME.md (table) beside it and docs/assets/NAME.svg.

    python -m benchmarks.render                    every file in benchmarks/results
    python -m benchmarks.render FILE.json ...

Numbers in documents come from here and are never typed by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import QUIET_CORES
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
PICTURES = RESULTS.parents[1] / "docs" / "assets"
NAMES = {
    "kvarn": "kvarn",
    "vllm": "vLLM (CPU)",
    "openvino": "OpenVINO GenAI",
    "llamacpp": "llama.cpp",
    "transformers": "transformers",
}
COLOURS = ("#d1682f", "#2f6690", "#81a4cd", "#5c946e", "#9a8c98")
TIE = "Differences under 10-15 % are ties."


def render(path: Path) -> None:
    """Write the table and the picture of one results file."""
    data = json.loads(path.read_text())
    table, bars = RENDERERS[data["benchmark"]](data)
    footer = _footer(data) if "rounds" in data["conditions"] else []
    path.with_suffix(".md").write_text("\n".join([*table, "", *footer, ""]))
    if not bars:
        return
    # The documentation can only show pictures that lie below it.
    _draw(bars, (PICTURES if path.parent == RESULTS else path.parent) / f"{path.stem}.svg")


def offline_table(data: dict[str, Any]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Rows: engines; columns: decode by batch, prefill by length (tokens/s, median of all runs)."""
    conditions = data["conditions"]
    columns = [("decode", size) for size in conditions["batches"]] + [
        ("prefill", size) for size in conditions["prefills"]
    ]
    figures: dict[str, dict[tuple[str, int], float]] = {}
    rows = []
    for engine, sessions in _good(data).items():
        runs = {column: _runs(sessions, column) for column in columns}
        figures[engine] = {column: median(rate for rate, _ in pairs) for column, pairs in runs.items()}
        cells = [_cell([rate for rate, _ in pairs], [load for _, load in pairs]) for pairs in runs.values()]
        loading = median(one["load_seconds"] for one in sessions)
        precision = sessions[0]["about"]["precision"]
        rows.append(f"| {NAMES[engine]} | {precision} | {' | '.join(cells)} | {loading:.1f} |")
    head = [f"{kind} {size}" for kind, size in columns]
    table = [
        "Offline, tokens/s: decode by batch, greedy "
        f"({conditions['input_tokens']} in, {conditions['output_tokens']} out), and prefill by prompt length.",
        "",
        f"| engine | precision | {' | '.join(head)} | load s |",
        "| --- " * (len(head) + 3) + "|",
        *rows,
    ]
    others = [engine for engine in figures if engine != "kvarn"]
    if "kvarn" in figures and others:
        ratios = [figures["kvarn"][column] / max(figures[one][column] for one in others) for column in columns]
        table.append(f"| **kvarn / best other** | | {' | '.join(f'**{ratio:.2f}**' for ratio in ratios)} | |")
    bars = {f"{kind} {size}": {one: rates[kind, size] for one, rates in figures.items()} for kind, size in columns}
    return table, bars


def served_table(data: dict[str, Any]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Rows: servers; columns: throughput, latency, reading quality, start-up (medians over the bursts)."""
    conditions = data["conditions"]
    figures: dict[str, dict[str, float]] = {}
    rows = []
    for engine, sessions in _good(data).items():
        bursts = [burst for session in sessions for burst in session["bursts"]]
        samples = {
            "tokens/s": [burst["output_throughput"] for burst in bursts],
            "TTFT mean s": [burst["ttft"]["mean"] for burst in bursts],
            "TTFT P50 s": [burst["ttft"]["p50"] for burst in bursts],
            "TTFT P99 s": [burst["ttft"]["p99"] for burst in bursts],
            "TPOT mean s": [burst["tpot"]["mean"] for burst in bursts],
            "ITL P50 s": [burst["itl"]["p50"] for burst in bursts],
            "ITL P99 s": [burst["itl"]["p99"] for burst in bursts],
            "effective tokens/s": [burst["effective_throughput"] for burst in bursts],
        }
        starts = [session["start_seconds"] for session in sessions]
        figures[engine] = {name: median(values) for name, values in samples.items()}
        foreign = [burst["foreign_cores"] for burst in bursts]
        failed = sum(burst["requests"] - burst["completed"] for burst in bursts)
        cells = [_cell(values, foreign) for values in samples.values()]
        rows.append(f"| {NAMES[engine]} | {' | '.join(cells)} | {_cell(starts, [0.0])} | {failed} |")
    columns = [*next(iter(figures.values()), {}), "start to first answer s", "failed"]
    table = [
        f"Served, OpenAI completions, streaming: {conditions['requests']} requests within {conditions['within']:g} s, "
        f"{conditions['input_tokens']} tokens in, {conditions['output_tokens']} out; readers of "
        f"{conditions['stream_rate']:g} tokens/s.",
        "",
        f"| server | {' | '.join(columns)} |",
        "| --- " * (len(columns) + 1) + "|",
        *rows,
    ]
    others = [one for engine, one in figures.items() if engine != "kvarn"]
    if "kvarn" in figures and others:
        throughput = figures["kvarn"]["tokens/s"] / max(one["tokens/s"] for one in others)
        first = min(one["TTFT P99 s"] for one in others) / figures["kvarn"]["TTFT P99 s"]
        table += [
            "",
            f"kvarn against the best other: throughput {throughput:.2f}x, P99 TTFT {first:.2f}x (above 1 is better).",
        ]
    shown = ("tokens/s", "TTFT mean s", "TTFT P99 s", "ITL P99 s")
    return table, {name: {engine: one[name] for engine, one in figures.items()} for name in shown}


def step_table(data: dict[str, Any]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Rows: batches; columns: a decode step's time and the share of it outside the model's forward pass."""
    conditions = data["conditions"]
    table = [
        f"A decode step of kvarn, greedy ({conditions['input_tokens']} in, {conditions['output_tokens']} out), median "
        f"(lowest-highest) of {conditions['repeats']} runs.",
        "",
        "| batch | step ms | outside the forward pass % |",
        "| --- | --- | --- |",
    ]
    for batch in sorted({row["batch"] for row in data["rows"]}):
        rows = [row for row in data["rows"] if row["batch"] == batch]
        foreign = [row["foreign_cores"] for row in rows]
        step = _cell([row["step_ms"] for row in rows], foreign)
        table.append(f"| {batch} | {step} | {_cell([100 * row['outside_share'] for row in rows], foreign)} |")
    return [*table, "", _machine_line(data["machine"])], {}


def linear_table(data: dict[str, Any]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Rows: layers; columns: rows of x; cells: kvarn's time, and how often it fits into oneDNN's."""
    counts = sorted({row["rows"] for row in data["rows"]})
    table = [
        "Linear layers of SmolLM2-135M in bf16: microseconds of kvarn's kernel (packed oneDNN / plain torch as "
        f"multiples of it), {data['conditions']['threads']} threads, median of "
        f"{data['conditions']['repeats']} alternating rounds, weights not in the caches.",
        "",
        f"| layer | {' | '.join(f'{count} rows' for count in counts)} |",
        "| --- " * (len(counts) + 1) + "|",
    ]
    for layer in dict.fromkeys(row["layer"] for row in data["rows"]):
        times = {row["rows"]: row["us"] for row in data["rows"] if row["layer"] == layer}
        cells = (
            f"{_short(us['kvarn'])} ({us['onednn'] / us['kvarn']:.2f} / {us['plain'] / us['kvarn']:.2f})"
            for us in (times[count] for count in counts)
        )
        table.append(f"| {layer} | {' | '.join(cells)} |")
    return [*table, "", _machine_line(data["machine"])], {}


RENDERERS = {"offline": offline_table, "served": served_table, "step": step_table, "linear": linear_table}
README = RESULTS.parents[1] / "README.md"
README_START, README_END = "<!-- results: rendered by benchmarks/render.py -->", "<!-- end of results -->"


def update_readme() -> None:
    """Put the tables of the committed results between the markers of the README."""
    parts = []
    for name in ("offline", "served"):
        path = RESULTS / f"{name}.json"
        if path.exists():
            data = json.loads(path.read_text())
            parts += [*RENDERERS[name](data)[0], ""]
    if not parts:
        return
    parts.append(f"{_machine_line(data['machine'])} Versions, settings and spread: [Performance](docs/performance.md).")
    before, _, rest = README.read_text().partition(README_START)
    after = rest.partition(README_END)[2]
    README.write_text(before + "\n\n".join([README_START, "\n".join(parts), README_END]) + after)


def _good(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Engine -> its sessions that did not fail, engines in the order of NAMES."""
    found = {}
    for engine in NAMES:
        sessions = data["engines"].get(engine, {"sessions": []})["sessions"]
        if good := [one for one in sessions if "error" not in one]:
            found[engine] = good
    return found


def _runs(sessions: list[dict[str, Any]], column: tuple[str, int]) -> list[tuple[float, float]]:
    """(tokens/s, foreign cores) of every run of one figure."""
    readings = [one for session in sessions for one in session["readings"] if (one["kind"], one["size"]) == column]
    return [pair for one in readings for pair in zip(one["repeats"], one["foreign_cores"], strict=True)]


def _cell(values: list[float], foreign: list[float]) -> str:
    """Median (lowest-highest), with a star when most runs were disturbed."""
    star = "*" if median(foreign) > QUIET_CORES else ""
    low, high = _short(min(values)), _short(max(values))
    spread = f" ({low}-{high})" if low != high else ""
    return f"{_short(median(values))}{star}{spread}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _footer(data: dict[str, Any]) -> list[str]:
    machine, conditions = data["machine"], data["conditions"]
    lines = [
        f"{_machine_line(machine)} Median (lowest-highest) of {conditions['rounds'] * conditions['repeats']} runs. "
        f"Model {conditions['model']}; {conditions['threads']} threads. {TIE} "
        f"`*`: other processes used more than {QUIET_CORES} cores meanwhile.",
        "",
    ]
    for engine, sessions in _good(data).items():
        about, last = sessions[-1]["about"], sessions[-1]["at"][:10]
        lines.append(f"- {NAMES[engine]} {about['version']} ({about['precision']}): {about['settings']}; {last}.")
    for engine, entry in data["engines"].items():
        lines += [f"- {NAMES[engine]} failed: {one['error']}" for one in entry["sessions"] if "error" in one]
    return lines


def _machine_line(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['cores']} cores ({', '.join(machine['instructions'])}), "
        f"{machine['memory_gib']} GiB; {machine['system']}, Python {machine['python']}."
    )


def _draw(bars: dict[str, dict[str, float]], path: Path) -> None:
    """One small bar chart a figure, engines in the same colours throughout."""
    figure = Figure(figsize=(2.1 * max(1, len(bars)), 3.2), layout="constrained")
    axes = figure.subplots(1, max(1, len(bars)), squeeze=False)[0]
    for axis, (title, values) in zip(axes, bars.items(), strict=False):
        for engine, value in values.items():
            place = list(NAMES).index(engine)
            axis.bar(place, value, color=COLOURS[place], label=NAMES[engine])
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.tick_params(axis="y", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(RESULTS.glob("*.json")):
        if json.loads(Path(name).read_text()).get("benchmark") in RENDERERS:
            render(Path(name))
            print(Path(name).with_suffix(".md"))
    update_readme()
