"""What every reproduction gives: rows of a published figure, the measured one, and whether our bar holds.

A row's `kind` says how it was measured: on this machine (real), by the engine on a virtual clock (simulated), or from a
closed form (model). The table that people read and the JSON that programs read are the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from kvarn.reproduce.statistics import Estimate

Kind = Literal["real", "simulated", "model"]
Level = Literal["quick", "default", "full"]
_EXACT = 1e-9
"""Two figures nearer than this are the same."""


@dataclass(frozen=True)
class Scope:
    """How much of an experiment to run, and the first of its seeds."""

    level: Level = "default"
    seed: int = 0

    @property
    def seeds(self) -> range:
        """Two repeats in a quick run, five by default, twenty in a full one."""
        return range(self.seed, self.seed + {"quick": 2, "default": 5, "full": 20}[self.level])

    @property
    def quick(self) -> bool:
        return self.level == "quick"


@dataclass(frozen=True)
class Row:
    """One figure: the paper's, ours, and what we ask of it."""

    id: str
    """Part, conditions and figure, like "e2.rtx4090.a.ttft_p99"."""
    metric: str
    unit: str
    measured: Estimate
    kind: Kind
    published: float | None = None
    """What the paper says, where it says it in numbers."""
    bar: str = ""
    """"<= 0.25", "< 1", ">= 1.5", "= 3", "0.98 to 1.02"; empty where nothing is asked."""
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the measured figure keeps the bar; None without one."""
        return meets(self.measured.value, self.bar) if self.bar else None

    def to_json(self) -> dict[str, Any]:
        value, low, high = (number if math.isfinite(number) else None for number in self.measured)
        return {
            "id": self.id, "metric": self.metric, "unit": self.unit, "published": self.published,
            "measured": value, "low": low, "high": high, "bar": self.bar or None, "holds": self.holds,
            "kind": self.kind, "note": self.note,
        }  # fmt: skip


def meets(value: float, bar: str) -> bool:
    """Whether `value` keeps a bar as `Row.bar` writes it; a NaN keeps none. ValueError for other texts."""
    words = bar.split()
    match words:
        case ["<=", limit]:
            return value <= float(limit) + _EXACT
        case ["<", limit]:
            return value < float(limit)
        case [">=", limit]:
            return value >= float(limit) - _EXACT
        case [">", limit]:
            return value > float(limit)
        case ["=", wanted]:
            return abs(value - float(wanted)) <= _EXACT
        case [low, "to", high]:
            return float(low) - _EXACT <= value <= float(high) + _EXACT
    raise ValueError(f"a bar is {bar!r}; expected a comparison like '<= 0.25', or '0.98 to 1.02'")


def table(document: dict[str, Any]) -> Table:
    """The rows of a document (its JSON) for people."""
    title = f"{document['name']}: {sum_up(document['rows'])}"
    shown = Table("row", title=title, title_justify="left", pad_edge=False, box=box.SIMPLE_HEAD)
    shown.columns[0].min_width = 24
    for name in ("paper", "ours", "95 %"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("bar", no_wrap=True)
    marks = {True: " [green]yes[/]", False: " [red]no[/]", None: ""}
    for row in document["rows"]:
        unit = "" if row["unit"] == "x" else f" ({row['unit']})"
        words = "; ".join(filter(None, (row["metric"] + unit, row["kind"], row["note"])))
        interval = "" if row["low"] is None else f"{_written(row['low'])}..{_written(row['high'])}"
        numbers = (_written(row["published"]), _written(row["measured"]), interval)
        shown.add_row(
            Text.assemble(row["id"], "\n", (words, "dim"), overflow="fold"),
            *numbers,
            (row["bar"] or "") + marks[row["holds"]],
        )
    return shown


def sum_up(rows: Sequence[dict[str, Any]]) -> str:
    asked = [row["holds"] for row in rows if row["holds"] is not None]
    return f"{sum(asked)} of {len(asked)} bars hold, {len(rows)} rows"


def _written(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"
