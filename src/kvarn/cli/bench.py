"""`kvarn bench`: measure a server as its users meet it (`serve`), or this engine alone (`offline`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvarn.bench import client, offline
from kvarn.bench.http import Endpoint
from kvarn.bench.prompts import PromptMaker, load_tokenizer, single_token_words
from kvarn.cli.bench_agents import bench_agents
from kvarn.cli.bench_rounds import bench_rounds
from kvarn.cli.options import ApiKey, AsJson, CacheDType, Model, Precision
from kvarn.cli.runs import lengths, progress_bar, stderr, write_results
from kvarn.errors import KvarnError
from kvarn.simulation import plots, traces, workloads
from kvarn.simulation.report import Report, RequestRecord, Slo, render, summarize
from kvarn.simulation.workloads import RequestSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

app = typer.Typer(no_args_is_help=True, help="Measure a server, or the engine alone.")
app.command("agents")(bench_agents)
app.command("rounds")(bench_rounds)


class ArrivalKind(StrEnum):
    burst = "burst"
    poisson = "poisson"
    gamma = "gamma"


class TraceFormat(StrEnum):
    mooncake = "mooncake"
    azure = "azure"
    burstgpt = "burstgpt"
    sharegpt = "sharegpt"
    kvarn = "kvarn"


class PromptKind(StrEnum):
    tokens = "tokens"
    text = "text"


_BATCH_HELP = "Sequences decoded at once; repeatable [dim](default: 1, 4, 16, 32)[/]."
_PREFILL_HELP = "Prompt length for prefill; repeatable [dim](default: 512, 2048)[/]."
_work = partial(typer.Option, rich_help_panel="Workload")
_sending = partial(typer.Option, rich_help_panel="Server and limits")
_results = partial(typer.Option, rich_help_panel="Results")


@app.command("serve")
def bench_serve(
    base_url: Annotated[str, typer.Option(help="The server, as OpenAI clients name it.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option(help="Model id; default: the first the server lists.")] = None,
    api_key: ApiKey = None,
    requests: Annotated[int, _work("--requests", "-n", min=1, help="How many.")] = 32,
    arrivals: Annotated[ArrivalKind, _work(help="When they come.")] = ArrivalKind.burst,
    within: Annotated[float, _work(help="burst: seconds it is spread over.")] = 1.0,
    rate: Annotated[float, _work(help="poisson, gamma: requests/s.")] = 2.0,
    cv: Annotated[float, _work(help="gamma: variation of the gaps; 1 is Poisson.")] = 2.0,
    input_tokens: Annotated[int, _work(help="Prompt length (mean).")] = 128,
    input_deviation: Annotated[float, _work(min=0, help="Its deviation; 0: all equal.")] = 0.0,
    output_tokens: Annotated[int, _work(help="Output length (mean).")] = 128,
    output_deviation: Annotated[float, _work(min=0, help="Its deviation; 0: all equal.")] = 0.0,
    trace: Annotated[Path | None, _work(help="Replay the first -n requests of this file instead.")] = None,
    trace_format: Annotated[TraceFormat, _work(help="What the file is.")] = TraceFormat.kvarn,
    speed: Annotated[float, _work(help="trace: replay so many times as fast.")] = 1.0,
    max_input: Annotated[int | None, _work(min=1, help="trace: cut prompts to this.")] = None,
    max_output: Annotated[int | None, _work(min=1, help="trace: cut outputs to this.")] = None,
    stream_rate: Annotated[float, _work(min=0, help="Tokens/s a reader reads; 0: no reader.")] = 20.0,
    seed: Annotated[int, _work(min=0, help="Of arrivals, lengths and content.")] = 0,
    chat: Annotated[bool, _sending("--chat", help="Use /chat/completions.")] = False,
    prompts: Annotated[PromptKind, _sending(help="How prompts are sent.")] = PromptKind.tokens,
    tokenizer: Annotated[str | None, _sending(help="Model whose tokenizer makes text prompts.")] = None,
    ignore_eos: Annotated[bool, _sending(help="Fixed output lengths.")] = True,
    concurrency: Annotated[int | None, _sending(min=1, help="Most in flight.")] = None,
    timeout: Annotated[float, _sending(min=0.1, help="Seconds a request may take.")] = 600.0,
    warmup: Annotated[int, _sending(min=0, help="Requests before measuring.")] = 2,
    slo_ttft: Annotated[float | None, _results(min=0, help="Goodput: seconds to first token.")] = None,
    slo_tpot: Annotated[float | None, _results(min=0, help="Goodput: seconds per token.")] = None,
    as_json: Annotated[bool, _results("--json", help="Print JSON, no table.")] = False,
    output: Annotated[Path | None, _results(help="Folder for report and requests.")] = None,
    plot: Annotated[Path | None, _results(help="Draw a picture into this file.")] = None,
) -> None:
    """Put load on any OpenAI-compatible server and report latency, throughput and how it reads.

    Requests come as a burst, by a random process, or from a recorded trace, and are streamed.
    """
    asked = SimpleNamespace(**locals())
    words = load_tokenizer(tokenizer) if tokenizer else None
    if words is None and (chat or prompts is PromptKind.text):
        raise KvarnError("text prompts of exact length need the model's tokenizer; name it with --tokenizer")
    specs = _specs(asked, words)
    records, name = asyncio.run(_load(asked, specs, words))
    report = summarize(records, slo=Slo(ttft=slo_ttft, tpot=slo_tpot), stream_rate=stream_rate or None)
    private = ("api_key", "as_json", "plot", "output")
    conditions = {key: value for key, value in vars(asked).items() if key not in private} | {"model": name}
    if output is not None:
        write_results(output, {"conditions": conditions, **report.to_json()}, records)
    _print(report, conditions, specs, records, as_json)
    if not report.completed:
        raise typer.Exit(1)
    if plot is not None:
        plots.draw_run(records, plot, title=f"{name}: {report.completed} of {report.requests} requests")


def _specs(asked: SimpleNamespace, words: Tokenizer | None) -> list[RequestSpec]:
    """What to send when: from a recorded trace, or drawn. `asked`: the options of `bench_serve`."""
    arrivals = _arrivals(asked.arrivals, asked.within, asked.rate, asked.cv)
    if asked.trace is None:
        inputs = lengths(asked.input_tokens, asked.input_deviation)
        outputs = lengths(asked.output_tokens, asked.output_deviation)
        return workloads.synthesize(asked.requests, arrivals, inputs, outputs, seed=asked.seed)
    count_tokens = (lambda text: len(words.encode(text).ids)) if words else None
    recorded = traces.load_trace(asked.trace, asked.trace_format.value, count_tokens)
    if asked.trace_format is TraceFormat.sharegpt:  # it records no times
        recorded = workloads.with_arrivals(recorded[: asked.requests], arrivals, seed=asked.seed)
    return workloads.replay(
        recorded, limit=asked.requests, speed=asked.speed, max_prompt_tokens=asked.max_input,
        max_output_tokens=asked.max_output,
    )  # fmt: skip


async def _load(
    asked: SimpleNamespace, specs: list[RequestSpec], words: Tokenizer | None
) -> tuple[list[RequestRecord], str]:
    """Send them; what became of each, and the model's name."""
    endpoint = Endpoint.parse(asked.base_url, asked.api_key)
    name = asked.model or await client.first_model(endpoint)
    text = asked.chat or asked.prompts is PromptKind.text
    load = client.LoadSettings(
        endpoint, name, chat=asked.chat, text_prompts=text, ignore_eos=asked.ignore_eos,
        concurrency=asked.concurrency, timeout=asked.timeout, stream_rate=asked.stream_rate or None,
    )  # fmt: skip
    maker = PromptMaker(asked.seed, words=single_token_words(words) if text and words else ())
    with progress_bar() as progress:
        task = progress.add_task("warming up", total=None)
        await client.warm_up(load, specs[0], maker, asked.warmup)
        progress.update(task, description="requests", total=len(specs))
        records = await client.run_load(load, specs, maker, on_done=lambda record: progress.advance(task))
    return records, name


def _print(
    report: Report,
    conditions: dict[str, Any],
    specs: Sequence[RequestSpec],
    records: Sequence[RequestRecord],
    as_json: bool,
) -> None:
    if as_json:
        typer.echo(json.dumps({"conditions": conditions, **report.to_json()}, default=str))
        return
    Console().print(render(report, title=f"{conditions['model']} at {conditions['base_url']}"))
    pairs = zip(records, specs, strict=True)
    short = sum(record.ok and len(record.token_times) != spec.output_tokens for record, spec in pairs)
    if short:
        stderr.print(f"{short} answers were not of the length asked for; does the server honour ignore_eos?")


@app.command("offline")
def bench_offline(
    model: Model = "smollm2",
    precision: Precision = "auto",
    kv_dtype: CacheDType = "auto",
    batch: Annotated[list[int] | None, typer.Option("--batch", "-b", min=1, help=_BATCH_HELP)] = None,
    input_tokens: Annotated[int, typer.Option(min=1, help="Prompt length for decode.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=2, help="Output length for decode.")] = 128,
    prefill: Annotated[list[int] | None, typer.Option(min=1, help=_PREFILL_HELP)] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; the median counts.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the random prompts.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Decode and prefill speed of kvarn's own engine in this process, greedy, on random prompts."""
    usual = offline.Workload()
    batches, prefills = tuple(batch or usual.batches), tuple(prefill or usual.prefills)
    workload = offline.Workload(batches, input_tokens, output_tokens, prefills, repeats, seed)
    with progress_bar() as progress:
        task = progress.add_task("loading", total=len(batches) + len(prefills))
        engine = offline.kvarn_engine(model, precision, kv_dtype=kv_dtype)
        progress.update(task, description="measuring")
        readings = offline.measure(engine.generate, workload, on_reading=lambda reading: progress.advance(task))
    if as_json:
        chosen = {"precision": engine.precision, "kv_dtype": engine.kv_dtype, "load_seconds": engine.load_seconds}
        rows = [reading.to_json() for reading in readings]
        typer.echo(json.dumps({"model": model, **chosen, "conditions": asdict(workload), "readings": rows}))
        return
    title = f"{model} {engine.precision}, cache {engine.kv_dtype}, loaded in {engine.load_seconds:.1f} s"
    table = Table("", "tokens/s", "repeats", title=title, title_justify="left")
    for reading in readings:
        what = f"decode, batch {reading.size}" if reading.kind == "decode" else f"prefill, {reading.size} tokens"
        table.add_row(what, f"{reading.tokens_per_second:,.1f}", " ".join(f"{one:,.1f}" for one in reading.repeats))
    Console().print(table)


def _arrivals(kind: ArrivalKind, within: float, rate: float, cv: float) -> workloads.Arrivals:
    if kind is ArrivalKind.burst:
        return workloads.Burst(within)
    return workloads.Poisson(rate) if kind is ArrivalKind.poisson else workloads.Gamma(rate, cv)
