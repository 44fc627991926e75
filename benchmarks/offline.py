"""Offline speed side by side: kvarn and other systems, each in its precisions, on the same weights.

    python -m benchmarks.offline                         all installed contenders, about fifteen minutes
    python -m benchmarks.offline --quick                 small settings: does everything run?
    python -m benchmarks.offline --only kvarn --merge    measure some again, keep the others' figures

Contenders: `benchmarks/contenders.py`. Each runs alone, in a process of its own environment, never two at once. They
take turns over the rounds, every other one in reverse order, so that a slow drift of the machine hits none in
particular. Figures and their definitions: `kvarn.bench.offline`. Before each run we wait for other processes to be
quiet; how busy they were during it is recorded. Results: `benchmarks/results/offline.json` and `.md`.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks import machine, model, render, settings
from benchmarks.contenders import CONTENDERS, chosen
from benchmarks.engines import EngineFailed, EngineProcess
from benchmarks.results import Results

from kvarn.bench.offline import Reading, Workload, measure


def run_session(name: str, workload: Workload, threads: int, limit: float, patience: float) -> dict[str, Any]:
    """One contender measured once through: {"about", "load_seconds", "sample", "readings"} or {"error"}."""
    contender = CONTENDERS[name]
    batches = tuple(batch for batch in workload.batches if batch <= contender.batches_up_to)

    def show(reading: Reading) -> None:
        print(f"{name:17} {reading.kind:8} {reading.size:5}  {reading.tokens_per_second:10,.1f} tokens/s", flush=True)

    try:
        with EngineProcess(name, contender, threads, limit) as engine:
            session = engine.load()
            print(f"{name:17} loaded in {session['load_seconds']:.1f} s", flush=True)
            readings = measure(
                engine.generate,
                Workload(**{**asdict(workload), "batches": batches}),
                on_reading=show,
                before_run=partial(machine.wait_until_quiet, patience),
            )
            foreign = iter(engine.foreign[1:])  # the first batch is the warm-up
            rows = [
                {**reading.to_json(), "foreign_cores": [round(next(foreign), 3) for _ in reading.repeats]}
                for reading in readings
            ]
            return {**session, "sample": engine.sample(), "readings": rows}
    except (EngineFailed, FileNotFoundError) as error:
        print(f"{name:17} failed: {error}", file=sys.stderr, flush=True)
        return {"error": str(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    settings.add_common(parser, rounds=3, repeats=1, limit=240.0)
    arguments = settings.parse(parser)
    shape = Workload(batches=(1, 4, 16, 32, 64), repeats=arguments.repeats)
    if arguments.quick:
        shape = Workload(batches=(1, 4), input_tokens=32, output_tokens=8, prefills=(128,), repeats=1)
    names = chosen(arguments.only, CONTENDERS)
    conditions = {**asdict(shape), "rounds": arguments.rounds, "threads": arguments.threads, "model": model.NAME}
    results = Results("offline", conditions, merge=arguments.merge, quick=arguments.quick)
    started = time.monotonic()
    for turn in range(arguments.rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            workload = Workload(**{**asdict(shape), "seed": turn})
            session = run_session(name, workload, arguments.threads, arguments.limit, arguments.patience)
            results.add_session(name, session, first=turn == 0)
    render.render(results.path)
    print(f"{time.monotonic() - started:.0f} s; written: {results.path} and {results.path.stem}.md")


if __name__ == "__main__":
    main()
