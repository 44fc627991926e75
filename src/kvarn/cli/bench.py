"""`kvarn bench`: measure a server as its users meet it (`serve`), or this engine alone (`offline`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvarn.bench import client, offline
from kvarn.bench.http import Endpoint
from kvarn.bench.prompts import PromptMaker, load_tokenizer, single_token_words
from kvarn.errors import KvarnError
from kvarn.serving.config import KVDType, PrecisionChoice
from kvarn.simulation import plots, traces, workloads
from kvarn.simulation.report import Report, RequestRecord, Slo, render, summarize
from kvarn.simulation.workloads import RequestSpec

app = typer.Typer(no_args_is_help=True, help="Measure a server, or the engine alone.")
_stderr = Console(stderr=True)


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
_WORKLOAD, _LIMITS, _OUTPUT = "Workload", "Server and limits", "Results"


@app.command("serve")
def bench_serve(
    base_url: Annotated[str, typer.Option(help="The server, as OpenAI clients name it.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option(help="Model id; default: the first the server lists.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar=["KVARN_API_KEY", "OPENAI_API_KEY"], show_envvar=True)] = None,
    requests: Annotated[int, typer.Option("--requests", "-n", min=1, help="How many.", rich_help_panel=_WORKLOAD)] = 32,
    arrivals: Annotated[
        ArrivalKind, typer.Option(help="When they come.", rich_help_panel=_WORKLOAD)
    ] = ArrivalKind.burst,
    within: Annotated[float, typer.Option(help="burst: seconds it is spread over.", rich_help_panel=_WORKLOAD)] = 1.0,
    rate: Annotated[float, typer.Option(help="poisson, gamma: requests/s.", rich_help_panel=_WORKLOAD)] = 2.0,
    cv: Annotated[
        float, typer.Option(help="gamma: variation of the gaps; 1 is Poisson.", rich_help_panel=_WORKLOAD)
    ] = 2.0,
    input_tokens: Annotated[int, typer.Option(help="Prompt length (mean).", rich_help_panel=_WORKLOAD)] = 128,
    input_deviation: Annotated[
        float, typer.Option(min=0, help="Its deviation; 0: all equal.", rich_help_panel=_WORKLOAD)
    ] = 0.0,
    output_tokens: Annotated[int, typer.Option(help="Output length (mean).", rich_help_panel=_WORKLOAD)] = 128,
    output_deviation: Annotated[
        float, typer.Option(min=0, help="Its deviation; 0: all equal.", rich_help_panel=_WORKLOAD)
    ] = 0.0,
    trace: Annotated[Path | None, typer.Option(help="Replay its first -n instead.", rich_help_panel=_WORKLOAD)] = None,
    trace_format: Annotated[
        TraceFormat, typer.Option(help="What it is.", rich_help_panel=_WORKLOAD)
    ] = TraceFormat.kvarn,
    speed: Annotated[float, typer.Option(help="trace: replay so many times as fast.", rich_help_panel=_WORKLOAD)] = 1.0,
    max_input: Annotated[
        int | None, typer.Option(min=1, help="trace: cut prompts to this.", rich_help_panel=_WORKLOAD)
    ] = None,
    max_output: Annotated[
        int | None, typer.Option(min=1, help="trace: cut outputs to this.", rich_help_panel=_WORKLOAD)
    ] = None,
    stream_rate: Annotated[
        float, typer.Option(min=0, help="Tokens/s read; 0: no reader.", rich_help_panel=_WORKLOAD)
    ] = 20.0,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals, lengths and content.", rich_help_panel=_WORKLOAD)] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use /chat/completions.", rich_help_panel=_LIMITS)] = False,
    prompts: Annotated[PromptKind, typer.Option(help="How to send them.", rich_help_panel=_LIMITS)] = PromptKind.tokens,
    tokenizer: Annotated[str | None, typer.Option(help="Model for text prompts.", rich_help_panel=_LIMITS)] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Fixed output lengths.", rich_help_panel=_LIMITS)] = True,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Most in flight.", rich_help_panel=_LIMITS)] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds a request.", rich_help_panel=_LIMITS)] = 600.0,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before measuring.", rich_help_panel=_LIMITS)] = 2,
    slo_ttft: Annotated[
        float | None, typer.Option(min=0, help="Goodput: seconds to first token.", rich_help_panel=_OUTPUT)
    ] = None,
    slo_tpot: Annotated[
        float | None, typer.Option(min=0, help="Goodput: seconds per token.", rich_help_panel=_OUTPUT)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.", rich_help_panel=_OUTPUT)] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for report and requests.", rich_help_panel=_OUTPUT)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw a picture into this file.", rich_help_panel=_OUTPUT)] = None,
) -> None:
    """Put load on any OpenAI-compatible server and report latency, throughput and how it reads.

    Requests come as a burst, by a random process, or from a recorded trace, and are streamed.
    """
    conditions = {
        name: value for name, value in locals().items() if name not in ("api_key", "as_json", "plot", "output")
    }
    text = chat or prompts is PromptKind.text
    text_tokenizer = load_tokenizer(tokenizer) if tokenizer else None
    if text and text_tokenizer is None:
        raise KvarnError("text prompts of exact length need the model's tokenizer; name it with --tokenizer")
    if trace is not None:
        count_tokens = (lambda words: len(text_tokenizer.encode(words).ids)) if text_tokenizer else None
        recorded = traces.load_trace(trace, trace_format.value, count_tokens)
        if trace_format is TraceFormat.sharegpt:
            recorded = workloads.with_arrivals(recorded[:requests], _arrivals(arrivals, within, rate, cv), seed=seed)
        specs = workloads.replay(
            recorded, limit=requests, speed=speed, max_prompt_tokens=max_input, max_output_tokens=max_output
        )
    else:
        lengths = _lengths(input_tokens, input_deviation), _lengths(output_tokens, output_deviation)
        specs = workloads.synthesize(requests, _arrivals(arrivals, within, rate, cv), *lengths, seed=seed)
    maker = PromptMaker(seed, words=single_token_words(text_tokenizer) if text and text_tokenizer else ())
    endpoint = Endpoint.parse(base_url, api_key)
    records, name = asyncio.run(
        _load(endpoint, model, specs, maker, warmup,
              chat=chat, text_prompts=text, ignore_eos=ignore_eos, concurrency=concurrency, timeout=timeout)
    )  # fmt: skip
    report = summarize(records, slo=Slo(ttft=slo_ttft, tpot=slo_tpot), stream_rate=stream_rate or None)
    if output is not None:
        _write(output, conditions | {"model": name}, records, report)
    _print(report, conditions | {"model": name}, specs, records, as_json)
    if not report.completed:
        raise typer.Exit(1)
    if plot is not None:
        plots.draw_run(records, plot, title=f"{name}: {report.completed} of {report.requests} requests")


async def _load(
    endpoint: Endpoint, model: str | None, specs: list[RequestSpec], maker: PromptMaker, warmup: int, **settings: Any
) -> tuple[list[RequestRecord], str]:
    name = model or await client.first_model(endpoint)
    load = client.LoadSettings(endpoint, name, **settings)
    with _progress() as progress:
        task = progress.add_task("warming up", total=None)
        await client.warm_up(load, specs[0], maker, warmup)
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
        _stderr.print(f"{short} answers were not of the length asked for; does the server honour ignore_eos?")


def _write(folder: Path, conditions: dict[str, Any], records: Sequence[RequestRecord], report: Report) -> None:
    """report.json (conditions, figures) and requests.jsonl (a record a request, seconds from the first arrival)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        document = {"conditions": conditions, **report.to_json()}
        (folder / "report.json").write_text(json.dumps(document, indent=2, default=str) + "\n")
        start = min(record.arrival for record in records)
        with (folder / "requests.jsonl").open("w") as file:
            for record in records:
                times = tuple(round(moment - start, 6) for moment in record.token_times)
                shifted = replace(record, arrival=round(record.arrival - start, 6), token_times=times)
                file.write(json.dumps(asdict(shifted)) + "\n")
    except OSError as error:
        raise KvarnError(f"cannot write results to {folder}: {error.strerror}") from error


@app.command("offline")
def bench_offline(
    model: Annotated[str, typer.Argument(help="Name, folder, GGUF file or hub id.")] = "smollm2",
    precision: Annotated[
        PrecisionChoice, typer.Option(help="Of the weights: auto, float32, bfloat16, int8 or int4.")
    ] = "auto",
    kv_dtype: Annotated[KVDType, typer.Option(help="Of cached keys and values: auto, bfloat16 or int8.")] = "auto",
    batch: Annotated[list[int] | None, typer.Option("--batch", "-b", min=1, help=_BATCH_HELP)] = None,
    input_tokens: Annotated[int, typer.Option(min=1, help="Prompt length for decode.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=2, help="Output length for decode.")] = 128,
    prefill: Annotated[list[int] | None, typer.Option(min=1, help=_PREFILL_HELP)] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; the median counts.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of the random prompts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, no table.")] = False,
) -> None:
    """Decode and prefill speed of kvarn's own engine in this process, greedy, on random prompts."""
    usual = offline.Workload()
    batches, prefills = tuple(batch or usual.batches), tuple(prefill or usual.prefills)
    workload = offline.Workload(batches, input_tokens, output_tokens, prefills, repeats, seed)
    with _progress() as progress:
        task = progress.add_task("loading", total=len(batches) + len(prefills))
        generate, load_seconds = offline.kvarn_engine(model, precision, kv_dtype=kv_dtype)
        progress.update(task, description="measuring")
        readings = offline.measure(generate, workload, on_reading=lambda reading: progress.advance(task))
    if as_json:
        rows = [reading.to_json() for reading in readings]
        result = {"model": model, "precision": precision, "kv_dtype": kv_dtype, "load_seconds": load_seconds}
        typer.echo(json.dumps(result | {"conditions": asdict(workload), "readings": rows}))
        return
    table = Table(
        "", "tokens/s", "repeats", title=f"{model} {precision}, loaded in {load_seconds:.1f} s", title_justify="left"
    )
    for reading in readings:
        what = f"decode, batch {reading.size}" if reading.kind == "decode" else f"prefill, {reading.size} tokens"
        table.add_row(what, f"{reading.tokens_per_second:,.1f}", " ".join(f"{one:,.1f}" for one in reading.repeats))
    Console().print(table)


def _arrivals(kind: ArrivalKind, within: float, rate: float, cv: float) -> workloads.Arrivals:
    if kind is ArrivalKind.burst:
        return workloads.Burst(within)
    return workloads.Poisson(rate) if kind is ArrivalKind.poisson else workloads.Gamma(rate, cv)


def _lengths(mean: int, deviation: float) -> workloads.Lengths:
    return workloads.TruncatedNormal(mean, deviation, high=max(1, 4 * mean)) if deviation else workloads.Fixed(mean)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=_stderr, transient=True)
