"""Servers side by side under one burst, with one client: kvarn, vLLM and llama.cpp's llama-server.

    python -m benchmarks.served                          all installed servers, about eight minutes
    python -m benchmarks.served --quick                  small settings: does everything run?
    python -m benchmarks.served --only kvarn --merge     measure some again, keep the others' figures

Each server runs alone, started by its own command (`benchmarks/servers.py`); the seconds from there to its first
answer are a result too. The client is the one behind `kvarn bench serve`, in this process. Prompts are random token
ids, so no prefix is shared. Servers take turns over the rounds, every other one in reverse. Results:
`benchmarks/results/served.*`.
"""

from __future__ import annotations

import argparse
import asyncio
from dataclasses import asdict
from typing import Any

from benchmarks import machine, model, settings
from benchmarks.contenders import chosen
from benchmarks.results import Results
from benchmarks.servers import SERVERS, Running, running
from benchmarks.turns import take_turns

from kvarn.bench import client
from kvarn.bench.prompts import PromptMaker
from kvarn.simulation.report import RequestRecord, summarize
from kvarn.simulation.workloads import Burst, Fixed, RequestSpec, synthesize


def run_session(name: str, specs: list[RequestSpec], arguments: argparse.Namespace, turn: int) -> dict[str, Any]:
    """Start one server, let it answer, put the bursts on it, stop it."""
    about = SERVERS[name].about()
    machine.wait_until_quiet(arguments.patience)
    with running(name, SERVERS[name], arguments.threads, arguments.limit) as server:
        print(f"{name:13} first answer after {server.start_seconds:.1f} s", flush=True)
        bursts = [
            burst(name, server, specs, seed=1000 * turn + repeat, arguments=arguments)
            for repeat in range(arguments.repeats)
        ]
    return {"about": about, "start_seconds": server.start_seconds, "bursts": bursts}


def burst(
    name: str, server: Running, specs: list[RequestSpec], *, seed: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One burst after a warm-up and a wait for quiet: the report as JSON, and the foreign load."""
    prompts = PromptMaker(seed=seed)
    asyncio.run(client.warm_up(server.load, specs[0], prompts, 2))
    machine.wait_until_quiet(arguments.patience)
    foreign = machine.ForeignLoad()
    records: list[RequestRecord] = asyncio.run(client.run_load(server.load, specs, prompts))
    cores = foreign.cores()
    report = summarize(records, stream_rate=arguments.stream_rate)
    print(
        f"{name:13} {report.output_throughput:8.1f} tokens/s   TTFT P99 {report.ttft.p99:.2f} s   "
        f"ITL P99 {report.itl.p99:.3f} s   {report.completed} of {report.requests}",
        flush=True,
    )
    return {**report.to_json(), "foreign_cores": round(cores, 3)}


def main() -> None:
    parser = settings.side_by_side(__doc__, rounds=2, repeats=2, limit=240.0)
    parser.add_argument("--requests", type=int, default=32, help="requests in a burst (default 32)")
    parser.add_argument("--within", type=float, default=1.0, help="seconds a burst is spread over (default 1)")
    parser.add_argument("--stream-rate", type=float, default=20.0, help="tokens/s a reader reads (default 20)")
    arguments = settings.parse(parser)
    tokens = 128
    if arguments.quick:
        arguments.requests, tokens = 4, 16
    arrivals = Burst(arguments.within)
    specs = synthesize(arguments.requests, arrivals, Fixed(tokens), Fixed(tokens))
    names = chosen(arguments.only, SERVERS)
    conditions = {
        "model": model.NAME, "threads": arguments.threads, "requests": arguments.requests, **asdict(arrivals),
        "input_tokens": tokens, "output_tokens": tokens, "stream_rate": arguments.stream_rate,
        "rounds": arguments.rounds, "repeats": arguments.repeats,
    }  # fmt: skip
    results = Results("served", conditions, merge=arguments.merge, quick=arguments.quick)

    def session(name: str, turn: int) -> dict[str, Any]:
        return run_session(name, specs, arguments, turn)

    take_turns(names, session, results, arguments)


if __name__ == "__main__":
    main()
