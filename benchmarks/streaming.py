"""Many readers at once on servers whose KV cache is too small for them: kvarn's policies, and vLLM.

    python -m benchmarks.streaming                         everybody, about 15 minutes
    python -m benchmarks.streaming --quick                 small settings: does everything run?
    python -m benchmarks.streaming --only kvarn --merge    measure some again, keep the others' figures

All requests of a burst together want OVER_COMMIT times the tokens that the KV cache holds, and all readers together
read a little less than the machine makes. Each server runs alone; the client is the one behind `kvarn bench serve`,
in this process. A seed says everything random, lengths and prompts alike, and is the same for everybody, so that
ratios are taken seed by seed. Servers take turns over the rounds. Results: `benchmarks/results/streaming.*`.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from dataclasses import replace
from typing import Any

from benchmarks import machine, model, settings
from benchmarks.contenders import chosen
from benchmarks.results import Results
from benchmarks.servers import Running, Server, kvarn, running, vllm
from benchmarks.turns import take_turns

from kvarn.bench import client, http
from kvarn.bench.prompts import PromptMaker
from kvarn.hardware.models import load_model_shape
from kvarn.simulation.report import RequestRecord, summarize
from kvarn.simulation.workloads import Burst, RequestSpec, TruncatedNormal, synthesize

BLOCK_TOKENS = 16
VLLM_BLOCK = 32
"""The smallest that its attention on CPUs knows."""
BFLOAT16_BYTES = 2.0
POLICIES = {
    "streaming": ("kvarn streaming", ("--host-memory", "auto")),
    "fcfs": ("kvarn FCFS", ()),
    "fcfs-paced": ("kvarn FCFS, paced", ()),
    "fcfs-conservative": ("kvarn FCFS, all tokens reserved", ()),
}
"""Policy -> its label, and the flags that go with it."""
COUNTERS = {
    "preemptions": r"^(?:kvarn_preemptions_total|vllm:num_preemptions_total)(?:\{.*\})? (\S+)$",
    "loads": r"^kvarn_loads_total (\S+)$",
    "steps": r"^kvarn_engine_steps_total (\S+)$",
    "computed_prompt_tokens": r"^kvarn_engine_prompt_tokens_total (\S+)$",
    "to_host_bytes": r"^kvarn_kv_to_host_bytes_total (\S+)$",
    "from_host_bytes": r"^kvarn_kv_from_host_bytes_total (\S+)$",
}
"""What a server's /metrics says of itself; those that it does not count are left out."""


def pool_tokens(arguments: argparse.Namespace) -> int:
    """Tokens of the KV cache, in whole blocks."""
    wanted = arguments.requests * (arguments.input_tokens + arguments.output_tokens)
    return int(wanted / arguments.over_commit) // BLOCK_TOKENS * BLOCK_TOKENS


def kv_bytes(tokens: int) -> int:
    """Bytes that so many tokens take in a KV cache of bfloat16."""
    return int(tokens * load_model_shape("smollm2").kv_bytes_per_token(BFLOAT16_BYTES))


def contenders(tokens: int) -> dict[str, Server]:
    """The servers, each with room for so many tokens in its KV cache."""
    pool = ("--kv-memory", str(kv_bytes(tokens)), "--block-size", str(BLOCK_TOKENS))
    ours = {}
    for policy, (title, extra) in POLICIES.items():
        flags = (*pool, "--policy", policy, *extra)
        server = kvarn(title, "bf16", flags, precision="bfloat16")
        ours[f"kvarn-{policy}"] = replace(server, settings=f"{server.settings}, {' '.join(flags)}")
    blocks = ("--block-size", str(VLLM_BLOCK), "--num-gpu-blocks-override", str(-(-tokens // VLLM_BLOCK)))
    return {**ours, "vllm-bf16": vllm(blocks)}


def workload(arguments: argparse.Namespace, seed: int) -> list[RequestSpec]:
    """The burst of one seed."""
    lengths = (TruncatedNormal(mean, arguments.deviation) for mean in (arguments.input_tokens, arguments.output_tokens))
    specs = synthesize(arguments.requests, Burst(), *lengths, seed=seed)
    return [replace(spec, stream_rate=arguments.stream_rate) for spec in specs]


def burst(
    name: str, server: Running, arguments: argparse.Namespace, seed: int, specs: list[RequestSpec]
) -> dict[str, Any]:
    """These requests after a warm-up and a wait for quiet: the report as JSON, what the server counted, foreign load.

    The contents of the prompts are the seed's.
    """
    prompts = PromptMaker(seed=seed)
    asyncio.run(client.warm_up(server.load, specs[0], prompts, 2))
    machine.wait_until_quiet(arguments.patience)
    foreign, before = machine.ForeignLoad(), asyncio.run(counters(server))
    records: list[RequestRecord] = asyncio.run(client.run_load(server.load, specs, prompts))
    cores = foreign.cores()
    after = asyncio.run(counters(server))
    report = summarize(records)
    print(
        f"{name:23} seed {seed}: TTFT mean {report.ttft.mean:.2f} P50 {report.ttft.p50:.2f} P99 {report.ttft.p99:.2f} s"
        f"   {report.output_throughput:.0f} tokens/s, {report.effective_throughput:.0f} effective   stalls "
        f"{report.rebuffer.mean:.2f} s in {report.stalled_requests}   makespan {report.makespan:.1f} s   "
        f"{report.completed} of {report.requests}, foreign {cores:.2f}",
        flush=True,
    )
    counted = {what: after[what] - before[what] for what in after}
    return {"seed": seed, **report.to_json(), "counted": counted, "foreign_cores": round(cores, 3)}


async def counters(server: Running) -> dict[str, float]:
    """What the server has counted since its start."""
    answer = await http.get(replace(server.load.endpoint, path=""), "/metrics")
    try:
        text = (await answer.body()).decode()
    finally:
        answer.close()
    found = {what: re.findall(pattern, text, re.MULTILINE) for what, pattern in COUNTERS.items()}
    return {what: sum(map(float, values)) for what, values in found.items() if values}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Flags of the workload, beside those of every comparison."""
    made = settings.side_by_side(description, rounds=3, repeats=1, limit=240.0)
    made.add_argument("--requests", type=int, default=64, help="requests in a burst (default 64)")
    made.add_argument("--input-tokens", type=int, default=96, help="mean length of prompts (default 96)")
    made.add_argument("--output-tokens", type=int, default=288, help="mean length of answers (default 288)")
    made.add_argument("--deviation", type=float, default=60.0, help="of both lengths (default 60)")
    made.add_argument("--over-commit", type=float, default=5.0, help="tokens wanted over tokens of KV (default 5)")
    made.add_argument("--stream-rate", type=float, default=8.0, help="tokens/s a reader reads (default 8)")
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags, with a quick run's few requests."""
    arguments = settings.parse(made)
    if arguments.quick:
        arguments.requests = 8
    return arguments


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of the results: those on the same machine under equal ones may be compared."""
    return {
        "model": model.NAME, "threads": arguments.threads, "requests": arguments.requests,
        "input_tokens": arguments.input_tokens, "output_tokens": arguments.output_tokens,
        "deviation": arguments.deviation, "over_commit": arguments.over_commit, "kv_tokens": pool_tokens(arguments),
        "stream_rate": arguments.stream_rate,
    }  # fmt: skip


def main() -> None:
    arguments = parsed(parser(__doc__))
    servers = contenders(pool_tokens(arguments))
    names = chosen(arguments.only, servers)
    results = Results("streaming", conditions(arguments), merge=arguments.merge, quick=arguments.quick)

    def session(name: str, turn: int) -> dict[str, Any]:
        about = servers[name].about()
        with running(name, servers[name], arguments.threads, arguments.limit) as server:
            seeds = range(turn * arguments.repeats, (turn + 1) * arguments.repeats)
            bursts = [burst(name, server, arguments, seed, workload(arguments, seed)) for seed in seeds]
        return {"about": about, "start_seconds": server.start_seconds, "bursts": bursts}

    take_turns(names, session, results, arguments)


if __name__ == "__main__":
    main()
