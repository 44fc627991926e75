"""Turn results into what the documentation shows: NAME.json -> NAME.md (table) beside it and docs/assets/NAME.svg.

    python -m benchmarks.render                    every file below benchmarks/results
    python -m benchmarks.render FILE.json ...

Either call also writes bars.md, and the tables into the README.

Numbers in documents come from here and are never typed by hand.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import (
    agents_tables,
    bars,
    certificate_tables,
    machine_tables,
    reproductions,
    rounds_tables,
    streaming_tables,
    tables,
)
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parent / "results"
PICTURES = RESULTS.parents[1] / "docs" / "assets"
README = RESULTS.parents[1] / "README.md"
README_START, README_END = "<!-- results: rendered by benchmarks/render.py -->", "<!-- end of results -->"
COLOURS = {
    "kvarn": ("#8f3d12", "#d1682f", "#f0a878"),
    "vLLM": ("#2f6690",),
    "OpenVINO": ("#3f8f6b", "#6fb895", "#a9d9c3"),
    "ONNX": ("#7b5ea7",),
    "llama.cpp": ("#4f4f4f", "#8a8a8a", "#bdbdbd"),
    "transformers": ("#c9b458",),
    "recompute": ("#4f4f4f",),
    "serial": ("#2f6690",),
    "batched": ("#6fb895",),
    "collective": ("#f0a878", "#d1682f", "#8f3d12"),
    "lego": ("#7b5ea7",),
}
"""By how a label begins; a system's precisions go from dark to light."""


def render(path: Path) -> None:
    """Write the table and the picture of one results file."""
    data = json.loads(path.read_text())
    table, heights = RENDERERS[_kind(data)](data, path.parent)
    footer = tables.footer(data) if "rounds" in data["conditions"] else []
    path.with_suffix(".md").write_text("\n".join([*table, "", *footer, ""]))
    if not heights:
        return
    # The documentation can only show pictures that lie below it.
    _draw(heights, (PICTURES if path.parent == RESULTS else path.parent) / f"{path.stem}.svg")


def _kind(data: dict[str, Any]) -> str:
    """Which renderer a file is for: reports of `kvarn reproduce` have rows with bars, and no benchmark's name."""
    return data.get("benchmark", "reproduction" if "hardware" in data and "rows" in data else "")


def is_close(name: str, folder: Path) -> bool:
    """Whether the precision of a contender of ours stays within MOST_KL of float32, by the results in `folder`."""
    path = folder / "quality.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    precision = {"bf16": "bfloat16"}.get(kind := name.rpartition("-")[2], kind)
    found = [row["mean_kl"] for row in rows if row["precision"] == precision]
    return max(found) <= tables.MOST_KL if found else precision == "bfloat16"


Renderer = Callable[[dict[str, Any], Path], tables.Rendered]
RENDERERS: dict[str, Renderer] = {
    "offline": lambda data, folder: tables.offline_table(data, lambda name: is_close(name, folder)),
    "long_context": lambda data, _: tables.long_context_table(data),
    "served": lambda data, _: tables.served_table(data),
    "quality": lambda data, _: tables.quality_table(data),
    "certificate": lambda data, _: certificate_tables.certificate_table(data),
    "limits": lambda data, _: machine_tables.limits_table(data),
    "neighbours": lambda data, _: machine_tables.neighbours_table(data),
    "overhead": lambda data, _: machine_tables.overhead_table(data),
    "step": lambda data, _: tables.step_table(data),
    "speculation": lambda data, _: machine_tables.speculation_table(data),
    "linear": lambda data, _: tables.linear_table(data),
    "streaming": lambda data, _: streaming_tables.streaming_table(data),
    "agents": lambda data, _: agents_tables.agents_table(data),
    "rounds": lambda data, _: rounds_tables.rounds_table(data),
    "simulator": lambda data, _: streaming_tables.simulator_table(data),
    "reproduction": lambda data, _: reproductions.reproduction_table(data),
    "gpu": lambda data, _: machine_tables.gpu_table(data),
}


def render_bars(folder: Path) -> None:
    """Write bars.md: every bar with what the results in `folder` say."""
    lines = bars.bars_table(folder, lambda name: is_close(name, folder))
    (folder / "bars.md").write_text("\n".join([*lines, ""]))


def update_readme() -> None:
    """Put the tables of the committed results between the markers of the README."""
    parts = []
    for name in ("offline", "served"):
        path = RESULTS / f"{name}.json"
        if path.exists():
            data = json.loads(path.read_text())
            parts += [*RENDERERS[name](data, RESULTS)[0], ""]
    if not parts:
        return
    machine = tables.machine_line(data)
    parts.append(f"{machine} Versions, settings and spread: [Performance](docs/performance.md).")
    before, _, rest = README.read_text().partition(README_START)
    after = rest.partition(README_END)[2]
    README.write_text(before + "\n\n".join([README_START, "\n".join(parts), README_END]) + after)


def _draw(heights: tables.Bars, path: Path) -> None:
    """One small bar chart a figure, everybody in the same colour throughout."""
    figure = Figure(figsize=(2.1 * max(1, len(heights)), 3.6), layout="constrained")
    axes = figure.subplots(1, max(1, len(heights)), squeeze=False)[0]
    labels = list(dict.fromkeys(label for values in heights.values() for label in values))
    colours = _colours(labels)
    shown = {}
    for axis, (title, values) in zip(axes, heights.items(), strict=False):
        for label, value in values.items():
            shown[label] = axis.bar(labels.index(label), value, color=colours[label])
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.tick_params(axis="y", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    if shown:
        figure.legend(
            shown.values(), list(shown), loc="outside lower center", ncols=min(6, len(shown)), fontsize=8, frameon=False
        )
    figure.savefig(path)


def _colours(labels: list[str]) -> dict[str, str]:
    found = {}
    for start, shades in COLOURS.items():
        for number, label in enumerate(label for label in labels if label.startswith(start)):
            found[label] = shades[number % len(shades)]
    return {label: found.get(label, "#9a8c98") for label in labels}


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:] or sorted(map(str, RESULTS.rglob("*.json")))):
        if _kind(json.loads(file.read_text())) in RENDERERS:
            render(file)
            print(file.with_suffix(".md"))
    render_bars(RESULTS)
    update_readme()
