"""`kvarn reproduce`: a paper's figures beside those measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvarn.cli.runs import progress_bar, stderr
from kvarn.errors import KvarnError
from kvarn.reproduce.contract import Level, Scope, table
from kvarn.reproduce.experiment import Experiment, Plan
from kvarn.reproduce.registry import EXPERIMENTS, load_experiment


def reproduce(
    name: Annotated[str, typer.Argument(help="Which paper, or all.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Under two minutes: fewer repeats, smaller loads.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Twenty repeats: hours.")] = False,
    only: Annotated[str, typer.Option(help="Parts of it: e0,e9.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="The first repeat's.")] = 0,
    output: Annotated[
        Path, typer.Option(help="Folder for report and pictures; a run that was stopped goes on from it.")
    ] = Path("reproductions"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
    list_all: Annotated[bool, typer.Option("--list", help="Say what there is, and run nothing.")] = False,
) -> None:
    """Run a paper's experiments and print its figures beside ours.

    Exit code 0 whatever comes out: it reports.
    """
    if list_all:
        for known in EXPERIMENTS:
            _describe(load_experiment(known))
        return
    if not name:
        raise KvarnError(f"say which paper: {', '.join(EXPERIMENTS)}, or all")
    if quick and full:
        raise KvarnError("--quick and --full exclude each other; give one of them, or neither")
    level: Level = "quick" if quick else "full" if full else "default"
    parts = [part for part in only.lower().split(",") if part]
    names = list(EXPERIMENTS) if name == "all" else [name]
    plans = [Plan.of(load_experiment(each), Scope(level, seed), parts) for each in names]
    documents = [_run(plan, output) for plan in plans]
    if as_json:
        typer.echo(json.dumps(documents if name == "all" else documents[0]))
        return
    console = Console()
    for document in documents:
        if console.is_terminal:
            console.print(table(document, console.width))
        else:  # a file or a pipe has lines of any length
            Console(width=10_000).print(table(document))


def _run(plan: Plan, output: Path) -> dict[str, Any]:
    folder = output / plan.experiment.name
    with progress_bar() as progress:
        task = progress.add_task(plan.experiment.name, total=len(plan.cells))
        document = plan.run(folder, on_done=lambda: progress.advance(task))
    stderr.print(f"report and pictures: {folder}", highlight=False, soft_wrap=True)
    return document


def _describe(experiment: Experiment) -> None:
    typer.echo(f"{experiment.name}  {experiment.title}. {experiment.source}")
    for part in experiment.parts(Scope()):
        typer.echo(f"    {part.id:4s} {part.title}")
