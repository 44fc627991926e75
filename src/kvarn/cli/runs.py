"""What commands that measure or simulate a run share: length options, the progress bar, result files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvarn.errors import KvarnError
from kvarn.simulation import workloads
from kvarn.simulation.report import RequestRecord

stderr = Console(stderr=True)


def lengths(mean: int, deviation: float) -> workloads.Lengths:
    """All equal, or normal with this deviation and cut at four times the mean."""
    return workloads.TruncatedNormal(mean, deviation, high=max(1, 4 * mean)) if deviation else workloads.Fixed(mean)


def progress_bar() -> Progress:
    """Counts what is done, on stderr, and vanishes; where stderr is no terminal it says nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)


def write_results(folder: Path, document: dict[str, Any], records: Sequence[RequestRecord]) -> None:
    """report.json (conditions, figures) and requests.jsonl (a record a request, seconds from the first arrival)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(document, indent=2, default=str) + "\n")
        start = min(record.arrival for record in records)
        with (folder / "requests.jsonl").open("w") as file:
            for record in records:
                times = tuple(round(moment - start, 6) for moment in record.token_times)
                shifted = replace(record, arrival=round(record.arrival - start, 6), token_times=times)
                file.write(json.dumps(asdict(shifted)) + "\n")
    except OSError as error:
        raise KvarnError(f"cannot write results to {folder}: {error.strerror}") from error
