"""`kvarn simulate`: the engine on a virtual clock and a modelled device, under any workload."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from kvarn.cli.runs import lengths, progress_bar, write_results
from kvarn.cli.sizes import parse_bytes
from kvarn.errors import KvarnError
from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.serving.config import AUTO, EngineConfig, KVDType, PolicyName, PrecisionChoice
from kvarn.serving.engine import Engine
from kvarn.simulation import plots, runner, scenarios, traces, workloads
from kvarn.simulation.assemble import simulated_engine
from kvarn.simulation.report import Report, Slo, render, summarize
from kvarn.simulation.workloads import Lengths, RequestSpec

TraceFormat = Literal["auto", "mooncake", "azure", "burstgpt", "sharegpt", "kvarn"]
_work = partial(typer.Option, rich_help_panel="Workload")
_device = partial(typer.Option, rich_help_panel="Device and model")
_engine = partial(typer.Option, rich_help_panel="Engine")
_result = partial(typer.Option, rich_help_panel="Results")


def simulate(
    workload: Annotated[str, _work(help="burst:60, poisson:2, gamma:2,cv=3 or burstgpt:2.")] = "burst:60",
    trace: Annotated[Path | None, _work(help="Replay this file instead.")] = None,
    trace_format: Annotated[TraceFormat, _work(help="What it is.")] = "auto",
    tokenizer: Annotated[str | None, _work(help="sharegpt: model whose tokens count.")] = None,
    requests: Annotated[int | None, _work("--requests", "-n", min=1, help="How many; all of a trace.")] = None,
    speed: Annotated[float, _work(help="trace: replay so many times as fast.")] = 1.0,
    max_input: Annotated[int | None, _work(min=1, help="trace: cut prompts to this.")] = None,
    max_output: Annotated[int | None, _work(min=1, help="trace: cut outputs to this.")] = None,
    input_tokens: Annotated[int | None, _work(min=1, help="Prompt length (mean).")] = None,
    input_deviation: Annotated[float, _work(min=0, help="Its deviation; 0: all equal.")] = 0.0,
    output_tokens: Annotated[int | None, _work(min=1, help="Output length (mean).")] = None,
    output_deviation: Annotated[float, _work(min=0, help="Its deviation; 0: all equal.")] = 0.0,
    stream_rate: Annotated[float, _work(min=0, help="Tokens/s read; 0: no reader.")] = 20.0,
    readers: Annotated[str, _work(help="Mixed readers instead: 0.4:15,0.6:20.")] = "",
    abandon: Annotated[str, _work(help="Share that leaves : after mean seconds, 0.1:5.")] = "",
    seed: Annotated[int, _work(min=0, help="Of everything random.")] = 0,
    hardware: Annotated[str, _device(help="rtx4090, a6000, a100-80, h100, h200, cpu or a profile.")] = "h200",
    model: Annotated[str, _device(help="llama3-8b, qwen2-7b, smollm2, ... or a folder.")] = "llama3-8b",
    precision: Annotated[PrecisionChoice, _device(help="Of the weights; auto: bfloat16.")] = "auto",
    kv_dtype: Annotated[KVDType, _device(help="Of cached keys and values.")] = "auto",
    memory_fraction: Annotated[float, _device(min=0.01, max=1.0, help="Memory for weights and KV.")] = 0.88,
    kv_memory: Annotated[str, _device(help="KV pool, like 2GiB [dim](default: by fraction)[/].")] = "",
    host_memory: Annotated[str, _device(help="KV that the pool has no room for; auto: by policy.")] = "auto",
    policy: Annotated[PolicyName, _engine(help="Scheduling policy.")] = "fcfs",
    policy_option: Annotated[
        list[str] | None, _engine(help="Setting of streaming or agentic, like tick=0.5; may be repeated.")
    ] = None,
    max_running: Annotated[int | None, _engine(min=1, help="Requests in one batch.")] = None,
    token_budget: Annotated[int | None, _engine(min=1, help="Tokens computed in one step.")] = None,
    prefill_budget: Annotated[int | None, _engine(min=1, help="Prompt tokens beside decoding.")] = None,
    max_context: Annotated[int, _engine(min=0, help="Tokens a request may have; 0: the model's.")] = 0,
    block_size: Annotated[int, _engine(min=1, help="Tokens in a KV block.")] = 16,
    share_prefixes: Annotated[bool, _engine(help="Reuse equal prefixes.")] = True,
    slo_ttft: Annotated[float | None, _result(min=0, help="Goodput: seconds to first token.")] = None,
    slo_tpot: Annotated[float | None, _result(min=0, help="Goodput: seconds per token.")] = None,
    as_json: Annotated[bool, _result("--json", help="Print JSON, no table.")] = False,
    output: Annotated[Path | None, _result(help="Folder for report and requests.")] = None,
    plot: Annotated[Path | None, _result(help="Folder to draw pictures into.")] = None,
) -> None:
    """Run the real scheduler and KV cache on a modelled device: the report of `bench serve` in virtual time.

    The same seed prints the same figures on every machine.
    """
    conditions = {name: value for name, value in locals().items() if name not in ("as_json", "output", "plot")}
    device, shape = load_accelerator(hardware), load_model_shape(model)
    if trace is not None:
        specs = _replayed(trace, trace_format, tokenizer, workload, seed)
        specs = workloads.replay(
            specs, limit=requests, speed=speed, max_prompt_tokens=max_input, max_output_tokens=max_output
        )
    else:
        prompt = _lengths("input", input_tokens, input_deviation)
        answer = _lengths("output", output_tokens, output_deviation)
        specs = scenarios.synthetic(workload, requests=requests, prompt=prompt, output=answer, seed=seed)
    specs = scenarios.with_clients(specs, readers, abandon, stream_rate=stream_rate or None, seed=seed)
    config = EngineConfig(
        model=shape.name,
        precision=precision,
        kv_dtype=kv_dtype,
        policy=policy,
        policy_options=tuple(policy_option or ()),
        max_context=max_context,
        max_running=max_running or device.max_running,
        token_budget=token_budget or device.token_budget,
        prefill_budget=prefill_budget or device.prefill_budget,
        block_size=block_size,
        kv_memory_bytes=parse_bytes(kv_memory, "--kv-memory") if kv_memory else 0,
        host_memory_bytes=AUTO if host_memory == "auto" else parse_bytes(host_memory, "--host-memory"),
        share_prefixes=share_prefixes,
        speculation="off",
    )
    engine = simulated_engine(config, device, shape, memory_fraction=memory_fraction)
    with progress_bar() as progress:
        task = progress.add_task("simulating", total=len(specs))
        done = runner.run(engine, specs, on_done=lambda record: progress.advance(task))
    report = summarize(done.records, slo=Slo(ttft=slo_ttft, tpot=slo_tpot), stream_rate=stream_rate or None)
    document = {"conditions": conditions, **report.to_json(), "engine": _engine_figures(engine, done.load)}
    if output is not None:
        write_results(output, document, done.records)
    if as_json:
        typer.echo(json.dumps(document, default=str))
    else:
        _print(report, document["engine"], f"{shape.name} on {device.title}, {policy}, simulated")
    if not report.completed:
        raise typer.Exit(1)
    if plot is not None:
        title = f"{shape.name} on {device.name}, {policy}, simulated"
        plots.draw_run(done.records, plot / "run.png", title)
        plots.draw_load(done.load.columns(), engine.cache.pool.num_blocks, plot / "load.png", title)


def _lengths(which: str, mean: int | None, deviation: float) -> Lengths | None:
    """What was asked for, or None for the workload's own."""
    if mean is None and deviation:
        raise KvarnError(f"--{which}-deviation is around a mean; give it with --{which}-tokens")
    return lengths(mean, deviation) if mean else None


def _replayed(trace: Path, format: str, tokenizer: str | None, workload: str, seed: int) -> list[RequestSpec]:
    """A trace's requests; those of a file without times arrive as `workload` says."""
    known = traces.detect_format(trace) if format == "auto" else format
    if known != "sharegpt":
        return traces.load_trace(trace, known)
    if tokenizer is None:
        raise KvarnError("a ShareGPT file holds text; name the model whose tokens count with --tokenizer")
    from kvarn.bench.prompts import load_tokenizer

    text = load_tokenizer(tokenizer)
    specs = traces.load_trace(trace, known, lambda words: len(text.encode(words).ids))
    return workloads.with_arrivals(specs, scenarios.WorkloadText.parse(workload).arrivals(), seed=seed)


def _engine_figures(engine: Engine, load: runner.LoadSeries) -> dict[str, Any]:
    """What the report of a client cannot know."""
    return {
        "steps": engine.counters.steps,
        "preemptions": engine.counters.preemptions,
        "loads": engine.counters.loads,
        "kv_tokens": engine.cache.pool.num_blocks * engine.cache.block_size,
        "prefix_hit_tokens": engine.cache.hit_tokens,
        "peak_running": max(load.running, default=0),
        "peak_waiting": max(load.waiting, default=0),
        "peak_kv_share": max(load.active_blocks, default=0) / engine.cache.pool.num_blocks,
    }


def _print(report: Report, figures: dict[str, Any], title: str) -> None:
    console = Console()
    console.print(render(report, title=title))
    rest = Table.grid(padding=(0, 2))
    rest.add_row(" KV pool tokens", f"{figures['kv_tokens']:,} ({figures['peak_kv_share']:.0%} used at most)")
    rest.add_row(" running, waiting", f"{figures['peak_running']}, {figures['peak_waiting']} at most")
    moves = f"{figures['preemptions']:,}, {figures['loads']:,} of them loaded back" if figures["loads"] else ""
    rest.add_row(" preemptions", moves or f"{figures['preemptions']:,} in {figures['steps']:,} steps")
    console.print(rest)
