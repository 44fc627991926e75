"""Tables of kvarn against its machine: limits, busy neighbours, what the server adds."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.tables import Bars, Column, Rendered, cell, good, grid, label, machine_line, runs_of, short, spread

GIGA = 1e9


def limits_table(data: dict[str, Any]) -> Rendered:
    """Rows: precisions; columns: decode's share of the read bandwidth, prefill's of the GEMM peak."""
    sessions, prefills = good(data), data["conditions"]["prefills"]
    columns: list[Column] = [("decode", 1), *(("prefill", tokens) for tokens in prefills)]
    rows = []
    for name, one in sessions.items():
        figures = (
            f"{short(median(rate for rate, _ in runs_of(one, column)))} tokens/s: "
            f"{100 * limit_share(data, name, column):.0f} %"
            for column in columns
        )
        rows.append([label(name, sessions), short(data["weight_bytes"][one[0]["precision"]] / 1e6), *figures])
    seen = [
        limits
        for one in sessions.values()
        for run in one
        for reading in run["readings"]
        for limits in reading["limits"]
    ]
    read, bf16, int8 = ([limits[kind] / GIGA for limits in seen] for kind in ("read", "bf16", "int8"))
    intro = (
        f"How close to the machine, which reads {spread(read)} GB/s and multiplies {spread(bf16)} GFLOP/s in bf16 and "
        f"{spread(int8)} GOP/s in int8, measured before and after each run. Decode at batch 1 as a share of the read "
        "bandwidth, prefill of the peak in its arithmetic; medians of the runs' shares."
    )
    head = ["precision", "matrices MB", *(f"{kind} {size}" for kind, size in columns)]
    return [intro, "", *grid(head, rows)], {}


def limit_share(data: dict[str, Any], name: str, column: Column) -> float:
    """Share of the machine's limit that a precision reaches in one figure: the median of its runs' shares."""
    sessions = good(data)[name]
    precision, (kind, tokens) = sessions[0]["precision"], column
    work = data["weight_bytes"][precision] if kind == "decode" else data["prefill_operations"][str(tokens)] / tokens
    limit = "read" if kind == "decode" else "bf16" if precision == "bfloat16" else "int8"
    readings = [one for session in sessions for one in session["readings"] if (one["kind"], one["size"]) == column]
    return median(
        work * rate / limits[limit]
        for one in readings
        for rate, limits in zip(one["repeats"], one["limits"], strict=True)
    )


def neighbours_table(data: dict[str, Any]) -> Rendered:
    """Rows: contenders; columns: decode quiet and beside a busy process, by batch."""
    conditions, sessions = data["conditions"], good(data)
    batches = conditions["batches"]
    rows: list[list[str]] = []
    bars: Bars = {f"batch {batch}: share kept": {} for batch in batches}
    for name, one in sessions.items():
        row = [label(name, sessions)]
        for batch in batches:
            quiet, busy, foreign = neighbour_rates(one, batch)
            if not busy:
                row += ["", "", ""]
                continue
            kept = median(busy) / median(quiet)
            row += [cell(quiet, foreign), cell(busy, [0.0]), f"**{kept:.2f}**"]
            bars[f"batch {batch}: share kept"][row[0]] = kept
        rows.append(row)
    intro = (
        f"Beside a process that keeps one of {conditions['threads']} cores busy: decode tokens/s, greedy "
        f"({conditions['input_tokens']} in, {conditions['output_tokens']} out), and the share that is left."
    )
    head = ["engine", *(title for batch in batches for title in (f"{batch} quiet", f"{batch} beside", "kept"))]
    return [intro, "", *grid(head, rows)], bars


def neighbour_rates(sessions: list[dict[str, Any]], batch: int) -> tuple[list[float], list[float], list[float]]:
    """Tokens/s quiet and beside the neighbour, and the foreign load of the quiet runs."""
    readings = [one for session in sessions for one in session["readings"] if one["size"] == batch]
    quiet, busy, foreign = (
        [value for one in readings for value in one[part]] for part in ("quiet", "busy", "foreign_cores")
    )
    return quiet, busy, foreign


def overhead_table(data: dict[str, Any]) -> Rendered:
    """Rows: precisions; columns: start, memory beyond weights and pool, throughput served and in process."""
    conditions, sessions = data["conditions"], good(data)
    rows = []
    for name, one in sessions.items():
        session = one[-1]
        rows.append([
            label(name, sessions),
            cell(session["start_seconds"], [0.0]),
            short(session["resident_bytes"] / 1e6),
            short(memory_beyond(session) / 1e6),
            cell(session["served"], session["foreign_cores"]),
            cell(session["in_process"], session["foreign_cores"]),
            f"**{median(session['served']) / median(session['in_process']):.2f}**",
        ])  # fmt: skip
    intro = (
        "What the server adds to the engine: start to first token; resident memory of all its processes, and what of "
        "it is neither weights nor KV pool (MB = 1,000,000 bytes); output tokens/s of "
        f"{conditions['requests']} requests ({conditions['tokens']} in, {conditions['tokens']} out), "
        f"{conditions['concurrency']} at a time, served and in process."
    )
    head = [
        "kvarn",
        "start s",
        "resident MB",
        "beyond weights and pool MB",
        "served",
        "in process",
        "served / in process",
    ]
    return [intro, "", *grid(head, rows)], {}


def memory_beyond(session: dict[str, Any]) -> float:
    """Resident bytes that are neither the matrices, once, nor the KV pool."""
    return float(session["resident_bytes"] - session["weight_bytes"] - session["pool_bytes"])


def gpu_table(data: dict[str, Any]) -> Rendered:
    """Rows: models, precisions, with and without graphs; columns: tokens/s, share of the roofline, a step's time."""
    columns = list(dict.fromkeys((row["kind"], row["size"]) for row in data["rows"]))
    engines: dict[tuple[str, str, bool], dict[tuple[str, int], str]] = {}
    for row in data["rows"]:
        step = f", {row['step_ms']:.2f} ms" if row["step_ms"] else ""
        text = f"{short(row['tokens_per_second'])} ({row['roofline_share']:.0%}{step})"
        cells = engines.setdefault((row["model"], row["precision"], row["graphs"]), {})
        cells[row["kind"], row["size"]] = text
    rows = [
        [model, precision, "yes" if graphs else "no", *(cells.get(column, "") for column in columns)]
        for (model, precision, graphs), cells in engines.items()
    ]
    conditions, limits, device = data["conditions"], data["limits"], data["device"]
    intro = (
        f"kvarn on {device.get('name', device['device'])}: tokens/s (share of the roofline, time of a step), greedy, "
        f"{conditions['input_tokens']} in, {conditions['output_tokens']} out, median of {conditions['repeats']} runs. "
        f"Measured in the same run: {limits['bytes_per_second'] / 1e9:,.0f} GB/s in a copy, "
        f"{limits['flops_per_second'] / 1e12:,.1f} TFLOP/s in a bfloat16 product."
    )
    head = ["model", "weights", "graphs", *(f"{kind} {size}" for kind, size in columns)]
    versions = f"torch {device['torch']}" + (f", CUDA {device['cuda']}" if "cuda" in device else "")
    return [intro, "", *grid(head, rows), "", f"{versions}. {machine_line(data)}"], {}


def speculation_table(data: dict[str, Any]) -> Rendered:
    """Rows: work and batch; columns: decode tokens/s of each mode, ratio, drafts that came true."""
    conditions, rows = data["conditions"], []
    for task, batch in dict.fromkeys((row["task"], row["batch"]) for row in data["rows"]):
        runs = {
            mode: [row for row in data["rows"] if (row["task"], row["batch"], row["mode"]) == (task, batch, mode)]
            for mode in ("off", "ngram", "auto")
        }
        rates = {mode: [row["tokens_per_second"] for row in ours] for mode, ours in runs.items()}
        cells = [cell(rates[mode], [row["foreign_cores"] for row in ours]) for mode, ours in runs.items()]
        drafted = sum(row["drafted"] for row in runs["auto"])
        accepted = sum(row["accepted"] for row in runs["auto"])
        rows.append([
            task,
            str(batch),
            *cells,
            f"**{median(rates['auto']) / median(rates['off']):.2f}**",
            f"{accepted} of {drafted}",
            "yes" if all(row["same_tokens"] for ours in runs.values() for row in ours) else "no",
        ])  # fmt: skip
    intro = (
        f"Decode tokens/s with and without speculation (precision {conditions['precision']}), greedy, "
        f"{conditions['output_tokens']} tokens out, median (lowest-highest) of {conditions['repeats']} runs."
    )
    head = ["work", "batch", "off", "ngram", "auto", "auto / off", "drafts of auto that came true", "same tokens"]
    return [intro, "", *grid(head, rows), "", machine_line(data)], {}
