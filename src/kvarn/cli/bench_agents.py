"""`kvarn bench agents`: programs of agents with simulated tools against a server, as their users would meet it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from rich.console import Console

from kvarn.bench import agents, client
from kvarn.bench.http import Endpoint
from kvarn.cli.options import ApiKey
from kvarn.cli.runs import progress_bar, stderr
from kvarn.errors import KvarnError
from kvarn.simulation.agents import pictures
from kvarn.simulation.agents.programs import ProgramSpec, read_programs, write_programs
from kvarn.simulation.agents.progress import Events
from kvarn.simulation.agents.report import AgentRun, render
from kvarn.simulation.agents.tools import LAWS, parse_law
from kvarn.simulation.agents.workload import AgentWorkload, Forecasts, Guess, draw_programs, with_time_scale
from kvarn.simulation.workloads import Burst, Poisson


class AppName(StrEnum):
    code_writer = "code-writer"
    deep_research = "deep-research"


class DataSetName(StrEnum):
    d1 = "d1"
    d2 = "d2"


_LAWS_HELP = f"Of tools: {', '.join(LAWS)}; lognormal:2 has the median 2 s, lognormal:2:0.5 also its shape."
_work = partial(typer.Option, rich_help_panel="Workload")
_sending = partial(typer.Option, rich_help_panel="Server")
_results = partial(typer.Option, rich_help_panel="Results")


def bench_agents(
    base_url: Annotated[str, typer.Option(help="The server, as OpenAI clients name it.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option(help="Model id; default: the first the server lists.")] = None,
    api_key: ApiKey = None,
    app: Annotated[AppName, _work(help="What the programs are.")] = AppName.code_writer,
    programs: Annotated[int, _work("--programs", "-n", min=1, help="How many.")] = 8,
    qps: Annotated[float, _work(min=0, help="Programs/s, Poisson; 0: all at once.")] = 0.2,
    dataset: Annotated[DataSetName, _work(help="Lengths: d1 like chat, d2 like programming.")] = DataSetName.d1,
    token_scale: Annotated[float, _work(help="All lengths times this, for small machines.")] = 1.0,
    durations: Annotated[str, _work(help=_LAWS_HELP)] = "lognormal",
    guess: Annotated[Guess, _work(help="What clients expect of a tool.")] = Guess.typical,
    forecast_error: Annotated[float, _work(min=0, help="How far off that is; 0.5: by up to 1.5 times.")] = 0.0,
    time_scale: Annotated[float, _work(help="Arrivals and tools take so many times as long.")] = 1.0,
    seed: Annotated[int, _work(min=0, help="Of everything drawn.")] = 0,
    trace: Annotated[Path | None, _work(help="Play the programs of this file instead.")] = None,
    events: Annotated[Events, _sending(help="What a server that takes events hears of tools.")] = Events.explicit,
    hints: Annotated[bool, _sending(help="Whether it gets hints.")] = True,
    ignore_eos: Annotated[bool, _sending(help="Fixed output lengths.")] = True,
    timeout: Annotated[float, _sending(min=0.1, help="Seconds a model call may take.")] = 600.0,
    as_json: Annotated[bool, _results("--json", help="Print JSON, no table.")] = False,
    output: Annotated[Path | None, _results(help="Folder for report, records and the programs.")] = None,
    plot: Annotated[Path | None, _results(help="Draw the programs over time into this file.")] = None,
) -> None:
    """Run applications of agents that call tools against any OpenAI-compatible server, and report how long they take.

    Tools only sleep. The same seed (or trace) is the same work for every server.
    """
    asked = SimpleNamespace(**locals())
    specs = _specs(asked)
    settings = agents.AgentSettings(
        Endpoint.parse(base_url, api_key), model or "", events, hints, ignore_eos=ignore_eos, timeout=timeout
    )
    run, settings, abilities = asyncio.run(_play(settings, specs))
    private = ("api_key", "as_json", "plot", "output")
    conditions = {name: value for name, value in vars(asked).items() if name not in private}
    conditions |= {"model": settings.model, "server": asdict(abilities)}
    if output is not None:
        _write(output, conditions, run, specs)
    if as_json:
        typer.echo(json.dumps({"conditions": conditions, **run.summary(), "work": run.work()}, default=str))
    else:
        Console().print(render(run, title=f"{settings.model} at {base_url}"))
    if plot is not None and run.calls:
        pictures.draw_timelines(run, plot, title=f"{len(run.done)} of {len(specs)} programs at {settings.model}")
    if not run.done:
        raise typer.Exit(1)


def _specs(asked: SimpleNamespace) -> list[ProgramSpec]:
    """What to play: from a file, or drawn. `asked`: the options of `bench_agents`."""
    if asked.trace is not None:
        return with_time_scale(read_programs(asked.trace), asked.time_scale)
    workload = AgentWorkload(
        asked.app.value,
        asked.dataset.value,
        asked.programs,
        Poisson(asked.qps) if asked.qps else Burst(0.0),
        parse_law(asked.durations),
        Forecasts(asked.guess, asked.forecast_error),
        asked.token_scale,
        asked.seed,
    )
    return with_time_scale(draw_programs(workload), asked.time_scale)


async def _play(
    settings: agents.AgentSettings, specs: list[ProgramSpec]
) -> tuple[AgentRun, agents.AgentSettings, agents.Abilities]:
    if not settings.model:
        settings = replace(settings, model=await client.first_model(settings.endpoint))
    with progress_bar() as progress:
        task = progress.add_task("asking the server what it knows", total=None)
        abilities = await agents.probe(settings)
        if not abilities.token_ids:
            stderr.print("the server does not say which tokens it made: prompts are text, of about the lengths wanted")
        if not abilities.events:
            stderr.print("the server takes no events of tool calls: it gets plain requests")
        progress.update(task, description="programs", total=len(specs))
        run = await agents.play_programs(settings, specs, abilities, on_done=lambda record: progress.advance(task))
    return run, settings, abilities


def _write(folder: Path, conditions: dict[str, Any], run: AgentRun, specs: list[ProgramSpec]) -> None:
    """report.json (conditions, figures, every record) and programs.jsonl (what was played, for --trace)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        document = {"conditions": conditions, **run.to_json()}
        (folder / "report.json").write_text(json.dumps(document, indent=1, default=str) + "\n")
    except OSError as error:
        raise KvarnError(f"cannot write results to {folder}: {error.strerror}") from error
    write_programs(specs, folder / "programs.jsonl")
