"""Tables of results, as lines of Markdown, each with the bars of its picture: {title: {who: value}}."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from benchmarks import machine

Lines = list[str]
Bars = dict[str, dict[str, float]]
Rendered = tuple[Lines, Bars]
Column = tuple[str, int]
CLASSES = ("bf16", "8-bit", "4-bit")
MOST_KL = 0.02
"""Mean KL divergence from float32 up to which a precision counts as the same model."""
TIE = "Differences under 10-15 % are ties."


def offline_table(data: dict[str, Any], allowed: Callable[[str], bool]) -> Rendered:
    """Rows: contenders by class; columns: decode by batch, prefill by length (tokens/s, median of all runs).

    `allowed(name)`: whether this contender of ours is close enough to float32 to be compared with everyone.
    """
    conditions = data["conditions"]
    columns = columns_of(data)
    figures = rates_of(data, columns)
    rows, sessions = [], good(data)
    for weights in dict.fromkeys((*CLASSES, *(weights_of(one) for one in sessions.values()))):
        members = [name for name, one in sessions.items() if weights_of(one) == weights]
        for name in members:
            runs = [runs_of(sessions[name], column) for column in columns]
            loading = median(one["load_seconds"] for one in sessions[name])
            rows.append([weights, label(name, sessions), *map(_run_cell, runs), f"{loading:.1f}"])
        ratios = ratios_to_best(figures, columns, members, members)
        if ratios:
            rows.append([weights, "**kvarn / best other**", *ratios, ""])
    ours = [name for name in sessions if name.startswith("kvarn") and allowed(name)]
    others = [name for name in sessions if not name.startswith("kvarn")]
    if ratios := ratios_to_best(figures, columns, [*ours, *others], others):
        rows.append(["all", f"**kvarn's fastest within KL {MOST_KL} / best of all**", *ratios, ""])
    intro = (
        "Offline, tokens/s: decode by batch, greedy "
        f"({conditions['input_tokens']} in, {conditions['output_tokens']} out), and prefill by prompt length. "
        "Classes by what the weights are stored as."
    )
    head = ["class", "engine", *(f"{kind} {size}" for kind, size in columns), "load s"]
    bars = {
        f"{kind} {size}": {
            label(name, sessions): rates[kind, size] for name, rates in figures.items() if (kind, size) in rates
        }
        for kind, size in columns
    }
    return [intro, "", *grid(head, rows)], bars


def long_context_table(data: dict[str, Any]) -> Rendered:
    """Rows: contenders; columns: decode by tokens of context."""
    conditions, sessions = data["conditions"], good(data)
    columns = [("decode", context) for context in conditions["contexts"]]
    figures = rates_of(data, columns)
    rows = [
        [label(name, sessions), *(_run_cell(runs_of(one, column)) for column in columns),
         short(median(session["prefill_seconds"] for session in one))]
        for name, one in sessions.items()
    ]  # fmt: skip
    others = [name for name in sessions if not name.startswith("kvarn")]
    if ratios := ratios_to_best(figures, columns, list(sessions), others):
        rows.append(["**kvarn's fastest / best other**", *ratios, ""])
    intro = (
        f"Decode with long contexts, tokens/s: {conditions['batch']} sequences of different contents, greedy, by "
        "tokens of context each. Last column: the time to compute all prompts (llama.cpp: one of them and copies)."
    )
    head = ["engine", *(f"{context:,} tokens" for _, context in columns), "prompts s"]
    bars = {
        f"{context:,} tokens": {label(name, sessions): rates["decode", context] for name, rates in figures.items()}
        for _, context in columns
    }
    return [intro, "", *grid(head, rows)], bars


def served_table(data: dict[str, Any]) -> Rendered:
    """Rows: servers; columns: throughput, latency, reading quality, start-up (medians over the bursts)."""
    conditions, sessions = data["conditions"], good(data)
    figures = {name: served_figures(one) for name, one in sessions.items()}
    rows = []
    for name, one in sessions.items():
        bursts = [burst for session in one for burst in session["bursts"]]
        foreign = [burst["foreign_cores"] for burst in bursts]
        failed = sum(burst["requests"] - burst["completed"] for burst in bursts)
        cells = [cell([read(burst) for burst in bursts], foreign) for read in SERVED.values()]
        starts = [session["start_seconds"] for session in one]
        rows.append([label(name, sessions), *cells, cell(starts, [0.0]), str(failed)])
    intro = (
        f"Served, OpenAI completions, streaming: {conditions['requests']} requests within {conditions['within']:g} s, "
        f"{conditions['input_tokens']} tokens in, {conditions['output_tokens']} out; readers of "
        f"{conditions['stream_rate']:g} tokens/s."
    )
    table = [intro, "", *grid(["server", *SERVED, "start to first answer s", "failed"], rows)]
    ours = [name for name in figures if name.startswith("kvarn")]
    others = [one for name, one in figures.items() if not name.startswith("kvarn")]
    for name in ours if others else []:
        throughput = figures[name]["tokens/s"] / max(one["tokens/s"] for one in others)
        first = figures[name]["TTFT P99 s"] / min(one["TTFT P99 s"] for one in others)
        gap = figures[name]["ITL P99 s"] / min(one["ITL P99 s"] for one in others)
        table += [
            "",
            f"{label(name, sessions)} against the best other in each: throughput {throughput:.2f}x (higher is better), "
            f"P99 TTFT {first:.2f}x, P99 ITL {gap:.2f}x (lower is better).",
        ]
    shown = ("tokens/s", "TTFT mean s", "TTFT P99 s", "ITL P99 s")
    return table, {title: {label(name, sessions): one[title] for name, one in figures.items()} for title in shown}


SERVED: dict[str, Callable[[dict[str, Any]], float]] = {
    "tokens/s": lambda burst: burst["output_throughput"],
    "TTFT mean s": lambda burst: burst["ttft"]["mean"],
    "TTFT P50 s": lambda burst: burst["ttft"]["p50"],
    "TTFT P99 s": lambda burst: burst["ttft"]["p99"],
    "TPOT mean s": lambda burst: burst["tpot"]["mean"],
    "ITL P50 s": lambda burst: burst["itl"]["p50"],
    "ITL P99 s": lambda burst: burst["itl"]["p99"],
    "effective tokens/s": lambda burst: burst["effective_throughput"],
}


def served_figures(sessions: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over all bursts of one server."""
    bursts = [burst for session in sessions for burst in session["bursts"]]
    return {name: median(read(burst) for burst in bursts) for name, read in SERVED.items()}


def quality_table(data: dict[str, Any]) -> Rendered:
    """Rows: precisions; columns: what they cost against float32."""
    conditions = data["conditions"]
    rows = [
        [
            row["precision"],
            f"{row['mean_kl']:.2g}",
            f"{row['p99_kl']:.2g}",
            f"{100 * row['top1']:.2f}",
            f"{row['nll']:.4f}",
            f"{row['perplexity']:.3f}",
        ]
        for row in data["rows"]
    ]
    tokens = data["rows"][0]["tokens"]
    intro = (
        f"What each precision costs: {tokens:,} tokens of {conditions['text']}, {conditions['texts']} conversations of "
        f"up to {conditions['length']} tokens, against float32 on the same weights (the bundled 4-bit file, "
        "de-quantised). KL in nats; perplexity of the text itself."
    )
    head = ["precision", "mean KL", "P99 KL", "same top token %", "NLL", "perplexity"]
    absent = [f"- {name}: {reason}" for name, reason in data["missing"].items()]
    return [intro, "", *grid(head, rows), "", *absent, f"Model {conditions['model']}. {machine_line(data)}"], {}


def step_table(data: dict[str, Any]) -> Rendered:
    """Rows: batches; columns: a decode step's time and the share of it outside the model's forward pass."""
    conditions = data["conditions"]
    rows = []
    for batch in sorted({row["batch"] for row in data["rows"]}):
        ours = [row for row in data["rows"] if row["batch"] == batch]
        foreign = [row["foreign_cores"] for row in ours]
        step = cell([row["step_ms"] for row in ours], foreign)
        rows.append([str(batch), step, cell([100 * row["outside_share"] for row in ours], foreign)])
    intro = (
        f"A decode step of kvarn (precision {conditions.get('precision', 'bfloat16')}), greedy "
        f"({conditions['input_tokens']} in, {conditions['output_tokens']} out), "
        f"median (lowest-highest) of {conditions['repeats']} runs."
    )
    lines = [intro, "", *grid(["batch", "step ms", "outside the forward pass %"], rows), "", *_phases(data["rows"])]
    return [*lines, machine_line(data)], {}


def _phases(rows: list[dict[str, Any]]) -> list[str]:
    """Rows: phases of the forward pass; columns: batches; cells: milliseconds of a step."""
    profiled = [row for row in rows if any(row.get("phases_ms", {}).values())]
    batches = sorted({row["batch"] for row in profiled})
    if not batches:
        return []
    runs = [[row["phases_ms"] for row in profiled if row["batch"] == batch] for batch in batches]
    body = [[phase, *(cell([run[phase] for run in of_batch], [0]) for of_batch in runs)] for phase in runs[0][0]]
    intro = "Milliseconds of such a step in each phase of the forward pass, all layers together:"
    return [intro, "", *grid(["phase", *(f"batch {batch}" for batch in batches)], body), ""]


def linear_table(data: dict[str, Any]) -> Rendered:
    """Rows: layers; columns: rows of x; cells: kvarn's time, and how often it fits into oneDNN's."""
    counts = sorted({row["rows"] for row in data["rows"]})
    intro = (
        "Linear layers of SmolLM2-135M in bf16: microseconds of kvarn's kernel (packed oneDNN / plain torch as "
        f"multiples of it), {data['conditions']['threads']} threads, median of "
        f"{data['conditions']['repeats']} alternating rounds, weights not in the caches."
    )
    rows = []
    for layer in dict.fromkeys(row["layer"] for row in data["rows"]):
        times = {row["rows"]: row["us"] for row in data["rows"] if row["layer"] == layer}
        cells = (
            f"{short(us['kvarn'])} ({us['onednn'] / us['kvarn']:.2f} / {us['plain'] / us['kvarn']:.2f})"
            for us in (times[count] for count in counts)
        )
        rows.append([layer, *cells])
    return [intro, "", *grid(["layer", *(f"{count} rows" for count in counts)], rows), "", machine_line(data)], {}


def good(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Contender -> its sessions that did not fail."""
    found = {}
    for name, entry in data["engines"].items():
        if sessions := [one for one in entry["sessions"] if "error" not in one]:
            found[name] = sessions
    return found


def label(name: str, sessions: dict[str, list[dict[str, Any]]]) -> str:
    return str(sessions[name][-1]["about"].get("label", name))


def weights_of(sessions: list[dict[str, Any]]) -> str:
    about = sessions[-1]["about"]
    return str(about.get("weights", about.get("precision")))


def columns_of(data: dict[str, Any]) -> list[Column]:
    conditions = data["conditions"]
    return [("decode", size) for size in conditions["batches"]] + [("prefill", size) for size in conditions["prefills"]]


def rates_of(data: dict[str, Any], columns: Sequence[Column]) -> dict[str, dict[Column, float]]:
    """Contender -> figure -> median tokens/s, figures that it did not run left out."""
    found = {}
    for name, sessions in good(data).items():
        runs = {column: runs_of(sessions, column) for column in columns}
        found[name] = {column: median(rate for rate, _ in pairs) for column, pairs in runs.items() if pairs}
    return found


def runs_of(sessions: list[dict[str, Any]], column: Column) -> list[tuple[float, float]]:
    """(tokens/s, foreign cores) of every run of one figure."""
    readings = [one for session in sessions for one in session["readings"] if (one["kind"], one["size"]) == column]
    return [pair for one in readings for pair in zip(one["repeats"], one["foreign_cores"], strict=True)]


def ratio_to_best(
    figures: dict[str, dict[Column, float]], column: Column, ours: Iterable[str], others: Iterable[str]
) -> float | None:
    """Our best of a figure over the best other's; None when one side has none."""
    mine = [figures[one][column] for one in ours if one.startswith("kvarn") and column in figures[one]]
    theirs = [figures[one][column] for one in others if not one.startswith("kvarn") and column in figures[one]]
    return max(mine) / max(theirs) if mine and theirs else None


def ratios_to_best(
    figures: dict[str, dict[Column, float]], columns: Sequence[Column], ours: list[str], others: list[str]
) -> list[str]:
    """One cell a figure; nothing when no figure has both sides."""
    ratios = [ratio_to_best(figures, column, ours, others) for column in columns]
    if all(ratio is None for ratio in ratios):
        return []
    return ["" if ratio is None else f"**{ratio:.2f}**" for ratio in ratios]


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return [f"| {line} |" for line in lines]


def cell(values: list[float], foreign: list[float]) -> str:
    """Median (lowest-highest), with a star when most runs were disturbed."""
    return spread(values, "*" if median(foreign) > machine.QUIET_CORES else "")


def spread(values: list[float], mark: str = "") -> str:
    """Median, a mark, and (lowest-highest) if they differ."""
    low, high = short(min(values)), short(max(values))
    return f"{short(median(values))}{mark}{f' ({low}-{high})' if low != high else ''}"


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def footer(data: dict[str, Any]) -> Lines:
    """The machine, how figures are made, and what each contender was."""
    conditions, sessions = data["conditions"], good(data)
    lines = [
        f"{machine_line(data)} Median (lowest-highest) of {conditions['rounds'] * conditions['repeats']} runs. "
        f"Model {conditions['model']}; {conditions['threads']} threads. {TIE} "
        f"`*`: other processes used more than {machine.QUIET_CORES} cores meanwhile.",
        "",
    ]
    for name, one in sessions.items():
        about, last = one[-1]["about"], one[-1]["at"][:10]
        lines.append(f"- {label(name, sessions)}, version {about['version']}: {about['settings']}; {last}.")
    for name, entry in data["engines"].items():
        errors = dict.fromkeys(one["error"] for one in entry["sessions"] if "error" in one)
        lines += [f"- {name} failed: {error}" for error in errors]
    return lines


def machine_line(data: dict[str, Any]) -> str:
    about = data["machine"]
    return (
        f"{about['processor']}, {about['cores']} cores ({', '.join(about['instructions'])}), "
        f"{about['memory_gib']} GiB; {about['system']}, Python {about['python']}."
    )


def _run_cell(runs: list[tuple[float, float]]) -> str:
    return cell([rate for rate, _ in runs], [load for _, load in runs]) if runs else ""
