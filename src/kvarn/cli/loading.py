"""Shows how far loading is: a bar on a terminal, a line a stage elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class LoadingDisplay:
    """Context manager; `update(stage, fraction)` may be called from any thread."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self._quiet = quiet
        self._stage = ""
        self._started = time.monotonic()
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self._quiet:
            self._progress = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
                console=self.console, transient=True,
            )  # fmt: skip
            self._task = self._progress.add_task("starting", total=1.0)
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def update(self, stage: str, fraction: float) -> None:
        """Show that `stage` is `fraction` (0 to 1) done."""
        if self._progress is not None:
            self._progress.update(self._task, description=stage, completed=fraction)
        elif stage != self._stage and not self._quiet:
            self.console.print(f"{stage} ...")
        self._stage = stage

    def ready(self, message: str) -> None:
        """Loading is over: remove the bar and say so."""
        self._stop()
        if not self._quiet:
            self.console.print(f"[bold green]ready[/] in {time.monotonic() - self._started:.1f} s: {message}")

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
