"""What kvarn's server adds to its engine: time to start, memory, and throughput against the engine in process.

    python -m benchmarks.overhead            about four minutes
    python -m benchmarks.overhead --quick    does everything run?

*Start*: seconds from starting the server's process to its first token, model installed and its files in the page cache.
*Memory*: resident bytes of all processes of the server (shared pages by their share, libraries' pages included), less
the matrices once in their precision and the KV pool. The pool is small, and the load goes through all of it before we
look, so that every byte of it is resident. *Throughput*: the same requests, 32 at a time, sent to the server by a
client on the same cores and given to the engine in process, in turns: all output tokens over the time to the last.
Results: `benchmarks/results/overhead.json` and `.md`.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from benchmarks import machine, model, settings
from benchmarks.contenders import Contender
from benchmarks.engines import EngineProcess
from benchmarks.results import Results
from benchmarks.servers import kvarn, resident_bytes, running
from benchmarks.turns import take_turns
from benchmarks.work import shape

from kvarn.bench import client
from kvarn.bench.offline import random_prompts
from kvarn.bench.prompts import PromptMaker
from kvarn.simulation.report import summarize
from kvarn.simulation.workloads import Burst, Fixed, RequestSpec, synthesize

PRECISIONS = ("bfloat16", "int4")
POOL_MIB = 128
FILLING = (24, 512, 8)
"""Requests, tokens in, tokens out: more than the pool holds, also with a cache of 8 bits."""
CONCURRENCY, REQUESTS, TOKENS = 32, 64, 128


def start_and_fill(precision: str, filling: tuple[int, int, int], threads: int) -> dict[str, Any]:
    """One start of the server with a small pool, and its memory after a load: {"start_seconds", "resident_bytes"}."""
    server = kvarn(f"kvarn {precision}", extra=("--kv-memory", f"{POOL_MIB}MiB"), precision=precision)
    count, tokens_in, tokens_out = filling
    specs = synthesize(count, Burst(0.0), Fixed(tokens_in), Fixed(tokens_out))
    with running(f"overhead-{precision}", server, threads) as up:
        asyncio.run(client.run_load(up.load, specs, PromptMaker(seed=5)))
        return {"start_seconds": up.start_seconds, "resident_bytes": resident_bytes(up.process)}


def throughputs(precision: str, specs: list[RequestSpec], arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s served and in process, `repeats` pairs; both stay loaded and an idle one takes no core."""
    found: dict[str, Any] = {"served": [], "in_process": [], "foreign_cores": []}
    inside = Contender("kvarn", "", "", settings={"precision": precision, "max_running": CONCURRENCY})
    tokens_in, tokens_out = specs[0].prompt_tokens, specs[0].output_tokens
    with (
        EngineProcess(f"overhead-{precision}", inside, arguments.threads, arguments.limit) as engine,
        running(f"overhead-{precision}", kvarn("kvarn", precision=precision), arguments.threads) as up,
    ):
        engine.load()
        engine.generate(random_prompts(4, 32, [1]), 8)
        asyncio.run(client.warm_up(up.load, RequestSpec(0.0, 32, 8), PromptMaker(seed=1), 2))
        for repeat in range(arguments.repeats):
            machine.wait_until_quiet(arguments.patience)
            load = machine.ForeignLoad()
            limits = client.LoadSettings(up.load.endpoint, up.load.model, concurrency=CONCURRENCY)
            records = asyncio.run(client.run_load(limits, specs, PromptMaker(seed=10 + repeat)))
            found["served"].append(summarize(records).output_throughput)
            times = engine.generate(random_prompts(len(specs), tokens_in, [2, repeat]), tokens_out)
            found["in_process"].append(len(specs) * tokens_out / max(one[-1] for one in times))
            found["foreign_cores"].append(round(load.cores(), 3))
            print(
                f"{precision:9} served {found['served'][-1]:7.1f}  in process {found['in_process'][-1]:7.1f} tokens/s"
            )
    return found


def run_session(precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All three figures of one precision."""
    filling, requests, tokens = ((2, 64, 4), 4, 16) if arguments.quick else (FILLING, REQUESTS, TOKENS)
    starts: list[dict[str, Any]] = []
    for _ in range(arguments.repeats):
        machine.wait_until_quiet(arguments.patience)
        starts.append(start_and_fill(precision, filling if not starts else (1, 64, 4), arguments.threads))
        print(f"{precision:9} first token after {starts[-1]['start_seconds']:.1f} s, "
              f"{starts[-1]['resident_bytes'] / 1e6:.0f} MB resident", flush=True)  # fmt: skip
    specs = synthesize(requests, Burst(0.0), Fixed(tokens), Fixed(tokens))
    return {
        "about": kvarn(f"kvarn {precision}", precision=precision).about(),
        "start_seconds": [start["start_seconds"] for start in starts],
        "resident_bytes": starts[0]["resident_bytes"],
        "weight_bytes": shape().weight_bytes(precision),
        "pool_bytes": POOL_MIB * 2**20,
        **throughputs(precision, specs, arguments),
    }


def main() -> None:
    arguments = settings.parse(settings.side_by_side(__doc__, rounds=1, repeats=3, limit=240.0))
    conditions = {
        "model": model.NAME, "threads": arguments.threads, "rounds": arguments.rounds, "repeats": arguments.repeats,
        "concurrency": CONCURRENCY, "requests": REQUESTS, "tokens": TOKENS,
    }  # fmt: skip
    results = Results("overhead", conditions, merge=arguments.merge, quick=arguments.quick)

    def session(name: str, turn: int) -> dict[str, Any]:
        return run_session(name.removeprefix("kvarn-"), arguments)

    take_turns([f"kvarn-{precision}" for precision in arguments.only or PRECISIONS], session, results, arguments)
    print(results.path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
