"""Runs a reproduction: parts with the cells they need in, a document of rows out.

A *cell* is one measurement under one set of conditions and one seed: a frozen value that can run in another process and
answers with plain values. Parts share cells; each runs once. With a folder to keep results in, every finished cell is
saved there at once and found again later, as long as kvarn's code is the same; so a run that was killed goes on where
it was.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import kvarn
from kvarn.errors import KvarnError
from kvarn.reproduce.contract import Row, Scope


class Cell(Protocol):
    """One measurement: frozen, hashable, picklable; its `repr` tells all of its conditions."""

    @property
    def cost(self) -> float:
        """Any measure of how long it takes: the longest start first."""
        ...

    @property
    def alone(self) -> bool:
        """Whether it measures this machine, and so must have it to itself."""
        ...

    def run(self) -> dict[str, Any]:
        """Figures as JSON can hold them."""
        ...


Results = Mapping[Cell, dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """One experiment of a paper."""

    id: str
    title: str
    cells: tuple[Cell, ...]
    rows: Callable[[Results], list[Row]]
    draw: Callable[[Results, Path], None] = lambda results, folder: None
    """Draws pictures into a folder."""


@dataclass(frozen=True)
class Experiment:
    """A paper."""

    name: str
    title: str
    source: str
    parts: Callable[[Scope], list[Part]]
    conditions: Callable[[Scope], dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """What is to be done: an experiment's parts at one scope."""

    experiment: Experiment
    scope: Scope
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, experiment: Experiment, scope: Scope, only: Sequence[str] = ()) -> Plan:
        """All parts or those named. KvarnError that names what there is."""
        parts = experiment.parts(scope)
        known = [part.id for part in parts]
        for id in only:
            if id not in known:
                raise KvarnError(f"{experiment.name} has no part {id!r}; it has {', '.join(known)}")
        return cls(experiment, scope, tuple(part for part in parts if not only or part.id in only))

    @property
    def cells(self) -> list[Cell]:
        """Each once; the longest first, those that need the machine alone last."""
        unique = dict.fromkeys(cell for part in self.parts for cell in part.cells)
        return sorted(unique, key=lambda cell: (cell.alone, -cell.cost))

    def run(self, folder: Path | None = None, on_done: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The document, which is also written to `folder` with the pictures; `on_done` hears of every cell."""
        results: dict[Cell, dict[str, Any]] = {}
        for cell, figures in _measured(self.cells, folder and folder / "cells"):
            results[cell] = figures
            on_done()
        document = {
            "name": self.experiment.name,
            "hardware": machine(),
            "conditions": {
                "source": self.experiment.source, "scope": self.scope.level, "seeds": list(self.scope.seeds),
                "parts": {part.id: part.title for part in self.parts}, **self.experiment.conditions(self.scope),
            },
            "rows": [row.to_json() for part in self.parts for row in part.rows(results)],
        }  # fmt: skip
        if folder is not None:
            _write(folder / "report.json", document)
            for part in self.parts:
                part.draw(results, folder)
        return document


def machine() -> str:
    """This machine, in words."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the architecture has to do
    return f"{name}, {_cores()} cores"


def _measured(cells: Sequence[Cell], folder: Path | None) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Every cell's figures, in the order in which they are there."""
    missing = []
    for cell in cells:
        found = folder and _read(folder / _file_name(cell))
        if found:
            yield cell, found
        else:
            missing.append(cell)
    for cell, figures in _computed(missing):
        if folder is not None:
            _write(folder / _file_name(cell), figures)
        yield cell, figures


def _computed(cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Side by side on all cores, then those that need the machine alone."""
    beside = [cell for cell in cells if not cell.alone]
    workers = min(_cores(), len(beside))
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
            futures = {pool.submit(cell.run): cell for cell in beside}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BrokenProcessPool as error:
                raise KvarnError(
                    "a worker process died, perhaps for want of memory; started again with the same --output, "
                    "the run goes on where it was"
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        beside = []
    for cell in (*beside, *(cell for cell in cells if cell.alone)):
        yield cell, cell.run()


def _end_with_parent() -> None:
    """In a worker: a key that interrupts the run ends it without a word, and so does the end of its parent.

    Else it would wait for work for ever when the parent was killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _file_name(cell: Cell) -> str:
    """Of what the cell is and of the code that measures it: another of either is another cell."""
    return hashlib.sha256(f"{cell!r} {_code()}".encode()).hexdigest()[:24] + ".json"


@cache
def _code() -> str:
    """Digest of everything of kvarn that a cell may depend on."""
    root, digest = Path(kvarn.__file__).parent, hashlib.sha256()
    for path in _sources(root):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _sources(root: Path) -> Iterable[Path]:
    parts = ("hardware", "kernels", "models", "bench", "serving", "simulation", "reproduce")
    return sorted(path for part in parts for kind in ("*.py", "*.toml") for path in (root / part).rglob(kind))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found


def _write(path: Path, document: Mapping[str, Any]) -> None:
    """Whole or not at all: a run may be killed at any moment."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(document, indent=1) + "\n")
        unfinished.replace(path)
    except OSError as error:
        raise KvarnError(f"cannot write results to {path.parent}: {error.strerror}; choose another --output") from error
