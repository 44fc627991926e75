"""What the documentation shows of `kvarn reproduce NAME`: its report (JSON) in, a table out.

Only rows with something to compare are shown: a figure of the paper's, or a bar of ours.
"""

from __future__ import annotations

from typing import Any

from benchmarks import tables

from kvarn.reproduce.contract import sum_up

_HEAD = ["| row | what | paper | ours | 95 % | bar | |", "| --- | --- | --- | --- | --- | --- | --- |"]


def reproduction_table(data: dict[str, Any]) -> tables.Rendered:
    """The rows of a report and, below them, its conditions."""
    rows = data["rows"]
    lines = [f"{sum_up(rows)}.", "", *_HEAD]
    lines += [_line(row) for row in rows if row["published"] is not None or row["bar"]]
    conditions = {name: value for name, value in data["conditions"].items() if isinstance(value, str)}
    lines += ["", f"{data['hardware']}. Conditions:", ""]
    lines += [f"- *{name}*: {text}" for name, text in conditions.items()]
    return lines, {}


def _line(row: dict[str, Any]) -> str:
    unit = "" if row["unit"] == "x" else f", {row['unit']}"
    interval = "" if row["low"] is None else f"{row['low']:.3g} to {row['high']:.3g}"
    kept = {True: "holds", False: "**missed**", None: ""}[row["holds"]]
    what = f"{row['metric']}{unit} ({'; '.join(filter(None, (row['kind'], row['note'])))})"
    measured = "" if row["measured"] is None else f"{row['measured']:.3g}"
    published = "" if row["published"] is None else f"{row['published']:.3g}"
    bar = (row["bar"] or "").replace("<=", "≤").replace(">=", "≥").replace("<", "&lt;").replace(">", "&gt;")
    return f"| {row['id']} | {what} | {published} | {measured} | {interval} | {bar} | {kept} |"
