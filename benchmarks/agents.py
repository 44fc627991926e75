"""Programs of agents on servers whose KV cache is too small for them, with tools that really sleep: kvarn, and vLLM.

    python -m benchmarks.agents                         everybody, about half an hour
    python -m benchmarks.agents --quick                 two programs: does everything run?
    python -m benchmarks.agents --only kvarn --merge    measure some again, keep the others' figures

Code-Writer's programs come as a Poisson process; their lengths are scaled down to this machine and the KV cache holds a
third of what they would hold together. Each server runs alone; the client is the one behind `kvarn bench agents`, in
this process, and tells of tool calls where the server listens. A seed says everything random, prompts and durations of
tools alike, and is the same for everybody, so that ratios are taken seed by seed; the digests of the work done are
compared. Servers take turns over the rounds. Results: `benchmarks/results/agents.*`.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import replace
from typing import Any

from benchmarks import machine, model, settings
from benchmarks.contenders import chosen
from benchmarks.results import Results
from benchmarks.servers import Running, Server, kvarn, running, vllm
from benchmarks.streaming import BLOCK_TOKENS, VLLM_BLOCK, counters, kv_bytes
from benchmarks.turns import take_turns

from kvarn.bench import agents
from kvarn.simulation.agents.programs import ProgramSpec
from kvarn.simulation.agents.workload import AgentWorkload, draw_programs, with_time_scale
from kvarn.simulation.workloads import Poisson

POLICIES = {
    "agentic": ("kvarn agentic", ("--policy", "agentic")),
    "fcfs": ("kvarn FCFS, prefix cache", ("--policy", "fcfs")),
    "resident": (
        "kvarn, KV stays while tools run", ("--policy", "agentic", "--policy-option", "like=resident")
    ),
}  # fmt: skip
"""Name -> its label and flags."""


def contenders(tokens: int) -> dict[str, Server]:
    """The servers, each with room for so many tokens in its KV cache."""
    pool = ("--kv-memory", str(kv_bytes(tokens)), "--block-size", str(BLOCK_TOKENS))
    ours = {}
    for name, (title, extra) in POLICIES.items():
        flags = (*pool, *extra)
        server = kvarn(title, "bf16", flags, precision="bfloat16")
        ours[f"kvarn-{name}"] = replace(server, settings=f"{server.settings}, {' '.join(flags)}")
    blocks = ("--block-size", str(VLLM_BLOCK), "--num-gpu-blocks-override", str(-(-tokens // VLLM_BLOCK)))
    return {**ours, "vllm-bf16": vllm((*blocks, "--enable-prompt-tokens-details"))}


def workload(arguments: argparse.Namespace, seed: int) -> list[ProgramSpec]:
    """The programs of one seed."""
    drawn = AgentWorkload(
        arguments.app, arguments.dataset, arguments.programs, Poisson(arguments.qps * arguments.time_scale),
        token_scale=arguments.token_scale, seed=seed,
    )  # fmt: skip
    return with_time_scale(draw_programs(drawn), arguments.time_scale)


def play(name: str, server: Running, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The programs of one seed, after a warm-up and a wait for quiet."""
    play_settings = agents.AgentSettings(server.load.endpoint, server.load.model)
    abilities = asyncio.run(agents.probe(play_settings))
    machine.wait_until_quiet(arguments.patience)
    foreign, before = machine.ForeignLoad(), asyncio.run(counters(server))
    run = asyncio.run(agents.play_programs(play_settings, workload(arguments, seed), abilities))
    cores = foreign.cores()
    after = asyncio.run(counters(server))
    found = run.summary()
    print(
        f"{name:18} seed {seed}: end to end mean {found['mean_seconds']:.1f} P50 {found['p50_seconds']:.1f} "
        f"P95 {found['p95_seconds']:.1f} s   makespan {found['makespan']:.1f} s   {found['completed']} of "
        f"{found['programs']} programs, {found['output_tokens']} tokens, foreign {cores:.2f}",
        flush=True,
    )
    counted = {what: after[what] - before[what] for what in after}
    work = sorted(run.work().values())
    return {"seed": seed, **found, "work": work, "counted": counted, "foreign_cores": round(cores, 3)}


def parsed() -> argparse.Namespace:
    """The flags, with a quick run's few programs."""
    made = settings.side_by_side(__doc__, rounds=3, repeats=1, limit=420.0)
    made.add_argument("--app", default="code-writer", help="application (default code-writer)")
    made.add_argument("--dataset", default="d1", help="data set of lengths (default d1)")
    made.add_argument("--programs", type=int, default=24, help="programs (default 24)")
    made.add_argument("--qps", type=float, default=1.0, help="programs a second (default 1)")
    made.add_argument("--token-scale", type=float, default=0.15, help="of all lengths (default 0.15)")
    made.add_argument("--time-scale", type=float, default=0.5, help="of tools' seconds (default 0.5)")
    made.add_argument("--kv-tokens", type=int, default=4608, help="tokens in the KV cache (default 4608)")
    arguments = settings.parse(made)
    if arguments.quick:
        arguments.programs = 2
    return arguments


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of the results: those on the same machine under equal ones may be compared."""
    names = ("threads", "app", "dataset", "programs", "qps", "token_scale", "time_scale", "kv_tokens")
    return {"model": model.NAME, **{name: getattr(arguments, name) for name in names}}


def main() -> None:
    arguments = parsed()
    servers = contenders(arguments.kv_tokens)
    names = chosen(arguments.only, servers)
    results = Results("agents", conditions(arguments), merge=arguments.merge, quick=arguments.quick)

    def session(name: str, turn: int) -> dict[str, Any]:
        about = servers[name].about()
        with running(name, servers[name], arguments.threads, arguments.limit) as server:
            seeds = range(turn * arguments.repeats, (turn + 1) * arguments.repeats)
            runs = [play(name, server, arguments, seed) for seed in seeds]
        return {"about": about, "start_seconds": server.start_seconds, "runs": runs}

    take_turns(names, session, results, arguments)


if __name__ == "__main__":
    main()
