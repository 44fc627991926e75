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
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvarn.reproduce.statistics import Estimate

Kind = Literal["real", "simulated", "model"]
Level = Literal["quick", "default", "full"]
_EXACT = 1e-9
"""Two figures nearer than this are the same."""
_UNBOUNDED = 10_000
"""Characters that no line takes."""
_FIGURES = ("paper", "ours", "95 %", "bar")


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


def table(document: dict[str, Any], width: int | None = None) -> Table:
    """The rows of a document (its JSON) for people, a line each.

    Where a line is more than `width` characters the notes are left out, then what each row measures; at last the
    figures of a row stand below its name.
    """
    for columns in (("what", "note"), ("what",), ()):
        shown = _table(document, columns)
        if width is None or Console(width=_UNBOUNDED).measure(shown).maximum <= width:
            return shown
    return _narrow_table(document)


def _table(document: dict[str, Any], columns: Sequence[str]) -> Table:
    """With these of the columns that are words."""
    shown = _empty_table(document, "row")
    for name in _FIGURES[:-1]:
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column(_FIGURES[-1], no_wrap=True)
    for name in columns:
        shown.add_column(name, style="dim", no_wrap=True)
    for row in document["rows"]:
        unit = "" if row["unit"] == "x" else f" ({row['unit']})"
        words = {"what": f"{row['metric']}{unit}; {row['kind']}", "note": row["note"]}
        shown.add_row(row["id"], *_figures(row), *(Text(words[name]) for name in columns))
    return shown


def _narrow_table(document: dict[str, Any]) -> Table:
    """One column: a row's name, and below it its figures."""

    def below(name: str, figures: Sequence[str]) -> str:
        paper, ours, interval, bar = figures
        return f"{name}\n{paper:>10}{ours:>10}{interval:>24}   {bar}"

    shown = _empty_table(document, below("row", _FIGURES))
    for row in document["rows"]:
        shown.add_row(below(row["id"], _figures(row)))
    return shown


def _empty_table(document: dict[str, Any], first: str) -> Table:
    title = f"{document['name']}: {sum_up(document['rows'])}"
    return Table(first, title=title, title_justify="left", pad_edge=False, box=box.SIMPLE_HEAD)


def _figures(row: dict[str, Any]) -> tuple[str, str, str, str]:
    interval = "" if row["low"] is None else f"{_written(row['low'])}..{_written(row['high'])}"
    bar = (row["bar"] or "") + {True: " [green]yes[/]", False: " [red]no[/]", None: ""}[row["holds"]]
    return _written(row["published"]), _written(row["measured"]), interval, bar


def sum_up(rows: Sequence[dict[str, Any]]) -> str:
    asked = [row["holds"] for row in rows if row["holds"] is not None]
    return f"{sum(asked)} of {len(asked)} bars hold, {len(rows)} rows"


def _written(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"
