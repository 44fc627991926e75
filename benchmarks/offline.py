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
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from benchmarks import machine, model, settings
from benchmarks.contenders import CONTENDERS, chosen
from benchmarks.engines import EngineProcess
from benchmarks.results import Results
from benchmarks.turns import take_turns

from kvarn.bench.offline import Reading, Workload, measure


def run_session(name: str, workload: Workload, arguments: argparse.Namespace) -> dict[str, Any]:
    """One contender measured once through: {"about", "load_seconds", "sample", "readings"}."""
    contender = CONTENDERS[name]
    batches = tuple(batch for batch in workload.batches if batch <= contender.batches_up_to)

    def show(reading: Reading) -> None:
        print(f"{name:17} {reading.kind:8} {reading.size:5}  {reading.tokens_per_second:10,.1f} tokens/s", flush=True)

    with EngineProcess(name, contender, arguments.threads, arguments.limit) as engine:
        session = engine.load()
        print(f"{name:17} loaded in {session['load_seconds']:.1f} s", flush=True)
        readings = measure(
            engine.generate,
            replace(workload, batches=batches),
            on_reading=show,
            before_run=partial(machine.wait_until_quiet, arguments.patience),
        )
        foreign = iter(engine.foreign[1:])  # the first batch is the warm-up
        rows = [
            {**reading.to_json(), "foreign_cores": [round(next(foreign), 3) for _ in reading.repeats]}
            for reading in readings
        ]
        return {**session, "sample": engine.sample(), "readings": rows}


def main() -> None:
    arguments = settings.parse(settings.side_by_side(__doc__, rounds=3, repeats=1, limit=240.0))
    shape = Workload(batches=(1, 4, 16, 32, 64), repeats=arguments.repeats)
    if arguments.quick:
        shape = Workload(batches=(1, 4), input_tokens=32, output_tokens=8, prefills=(128,), repeats=1)
    names = chosen(arguments.only, CONTENDERS)
    conditions = {**asdict(shape), "rounds": arguments.rounds, "threads": arguments.threads, "model": model.NAME}
    results = Results("offline", conditions, merge=arguments.merge, quick=arguments.quick)

    def session(name: str, turn: int) -> dict[str, Any]:
        return run_session(name, replace(shape, seed=turn), arguments)

    take_turns(names, session, results, arguments)


if __name__ == "__main__":
    main()
