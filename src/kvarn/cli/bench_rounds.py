"""`kvarn bench rounds`: agents that read one another's answers round by round, against a server."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from rich.console import Console

from kvarn.bench import client, rounds
from kvarn.bench.http import Endpoint
from kvarn.bench.prompts import DEFAULT_TOKENS, load_tokenizer
from kvarn.cli.options import ApiKey
from kvarn.cli.runs import progress_bar, stderr
from kvarn.errors import KvarnError
from kvarn.simulation.rounds.report import RoundsRun, render
from kvarn.simulation.rounds.scenarios import Society, Span, scenarios_of
from kvarn.simulation.rounds.texts import CHATML, Frame, RoundTexts, ScenarioTexts, SeededTexts
from kvarn.simulation.rounds.workload import HistoryStyle, Order, RoundWorkload, SocietySpec, draw_societies

_work = partial(typer.Option, rich_help_panel="Workload")
_sending = partial(typer.Option, rich_help_panel="Server")
_results = partial(typer.Option, rich_help_panel="Results")


def bench_rounds(
    base_url: Annotated[
        str, typer.Argument(help="The server, as OpenAI clients name it.")
    ] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option(help="Model id; default: the first the server lists.")] = None,
    api_key: ApiKey = None,
    society: Annotated[Society, _work(help="Few agents that remember little, or many that remember much.")] = (
        Society.generative
    ),
    scenario: Annotated[str | None, _work(help="By name; default: the first of the society.")] = None,
    agents: Annotated[int, _work("--agents", "-n", min=0, help="Of a society; 0: the scenario's number.")] = 0,
    rounds_: Annotated[int, _work("--rounds", min=1, help="One after the other.")] = 3,
    history: Annotated[str | None, _work(help="Tokens of private memory: 256, or 128:512.")] = None,
    output: Annotated[str | None, _work(help="Tokens of an answer: 32, or 32:128.")] = None,
    task_tokens: Annotated[int, _work(min=1, help="Tokens of the task.")] = 24,
    order: Annotated[Order, _work(help="In which agents read what was said.")] = Order.rotated,
    visibility: Annotated[float, _work(help="Share of the outputs that an agent sees.")] = 1.0,
    stragglers: Annotated[float, _work(help="Share of requests that come late.")] = 0.0,
    think: Annotated[float, _work(min=0, help="Seconds they come late by, on average.")] = 1.0,
    style: Annotated[HistoryStyle, _work(help="What agents keep: a memory with notes, or all.")] = HistoryStyle.rolling,
    societies: Annotated[int, _work(min=1, help="How many.")] = 1,
    qps: Annotated[float, _work(min=0, help="Rounds/s of all of them; 0: all begin at once.")] = 0.0,
    seed: Annotated[int, _work(min=0, help="Of everything drawn.")] = 0,
    tokenizer: Annotated[
        str | None, _sending(help="Model whose tokenizer makes texts; else tokens are random.")
    ] = None,
    plain: Annotated[bool, _sending("--plain", help="Say nothing of segments and rounds.")] = False,
    ignore_eos: Annotated[bool, _sending(help="Fixed output lengths.")] = True,
    timeout: Annotated[float, _sending(min=0.1, help="Seconds a request may take.")] = 600.0,
    as_json: Annotated[bool, _results("--json", help="Print JSON, no table.")] = False,
    save: Annotated[Path | None, _results(help="File for figures and every record, as JSON.")] = None,
) -> None:
    """Let societies of agents talk in rounds on any OpenAI-compatible server, and report how long rounds take.

    In a round every agent reads what all have said in the last one. The same seed is the same work for every server.
    """
    asked = SimpleNamespace(**locals())
    specs = draw_societies(_workload(asked))
    endpoint = Endpoint.parse(base_url, api_key)
    settings = rounds.RoundSettings(endpoint, model or "", not plain, ignore_eos, timeout)
    run, settings, abilities = asyncio.run(_play(asked, settings, specs))
    conditions = {name: value for name, value in vars(asked).items() if name not in ("api_key", "as_json", "save")}
    conditions["rounds"] = conditions.pop("rounds_")
    conditions |= {"scenario": specs[0].scenario.name, "agents": len(specs[0].agents), "model": settings.model}
    conditions["server"] = asdict(abilities)
    if save is not None:
        _write(save, {"conditions": conditions, **run.to_json()})
    if as_json:
        typer.echo(json.dumps({"conditions": conditions, **run.summary()}, default=str))
    else:
        Console().print(render(run, title=f"{settings.model} at {base_url}: {_title(specs, settings)}"))
    if run.failures:
        raise typer.Exit(1)


def _workload(asked: SimpleNamespace) -> RoundWorkload:
    return RoundWorkload(
        scenario=asked.scenario or scenarios_of(asked.society)[0].name,
        agents=asked.agents,
        rounds=asked.rounds_,
        history=Span.parse(asked.history, "history") if asked.history else None,
        output=Span.parse(asked.output, "output") if asked.output else None,
        task_tokens=asked.task_tokens,
        order=asked.order,
        visibility=asked.visibility,
        stragglers=asked.stragglers,
        think_seconds=asked.think,
        style=asked.style,
        societies=asked.societies,
        qps=asked.qps,
        seed=asked.seed,
    )


async def _play(
    asked: SimpleNamespace, settings: rounds.RoundSettings, specs: list[SocietySpec]
) -> tuple[RoundsRun, rounds.RoundSettings, rounds.Abilities]:
    if not settings.model:
        settings = replace(settings, model=await client.first_model(settings.endpoint))
    encode: rounds.Encode | None = None
    texts: RoundTexts = SeededTexts(*DEFAULT_TOKENS, asked.seed)
    if asked.tokenizer:
        words = load_tokenizer(asked.tokenizer)
        encode = lambda text: words.encode(text, add_special_tokens=False).ids  # noqa: E731
        texts = ScenarioTexts(encode, asked.seed, CHATML if words.token_to_id("<|im_start|>") is not None else Frame())
    with progress_bar() as progress:
        task = progress.add_task("asking the server what it knows", total=None)
        abilities = await rounds.probe(settings)
        if settings.segments and not abilities.segments:
            stderr.print("the server takes no segments: it gets plain prompts")
            settings = replace(settings, segments=False)
        if not abilities.token_ids:
            if encode is None:
                raise KvarnError(
                    "the server does not say which tokens it made (return_token_ids), and others are to read them; "
                    "name the model's tokenizer with --tokenizer"
                )
            stderr.print("the server does not say which tokens it made: they are taken from its text")
        progress.update(task, description="rounds", total=sum(len(spec.rounds) for spec in specs))
        run = await rounds.play_rounds(
            settings, specs, texts, encode=encode, on_round=lambda record: progress.advance(task)
        )
    return run, settings, abilities


def _title(specs: list[SocietySpec], settings: rounds.RoundSettings) -> str:
    many = f"{len(specs)} times " if len(specs) > 1 else ""
    told = "with segments" if settings.segments else "plain prompts"
    return f"{many}{specs[0].scenario.name}, {len(specs[0].agents)} agents, {told}"


def _write(file: Path, document: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1, default=str) + "\n")
    except OSError as error:
        raise KvarnError(f"cannot write results to {file}: {error.strerror}") from error
