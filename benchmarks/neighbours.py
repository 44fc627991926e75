"""Decode speed beside a busy process: quiet and with one core kept busy, in turns.

    python -m benchmarks.neighbours            about six minutes
    python -m benchmarks.neighbours --quick    does everything run?

Every machine shares its cores with something. The neighbour is a process that spins at normal priority. Each pair of
runs is one quiet, one beside it; an engine that needs longer than PATIENCE for the second is not asked again. Results:
`benchmarks/results/neighbours.json` and `.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks import machine, model, settings
from benchmarks.contenders import CONTENDERS, chosen
from benchmarks.engines import EngineFailed, EngineProcess
from benchmarks.results import Results
from benchmarks.turns import take_turns

from kvarn.bench.offline import decode_rate, random_prompts

NAMES = ("kvarn-bf16", "kvarn-int4", "vllm-bf16", "openvino-4bit", "onnx-4bit", "llamacpp-bf16")
BATCHES = (1, 16)
INPUT_TOKENS, OUTPUT_TOKENS = 16, 48
PATIENCE = 15.0
"""Seconds for one run beside the neighbour after which one is enough."""


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """A process that does nothing but use a core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run_session(name: str, batches: tuple[int, ...], arguments: argparse.Namespace) -> dict[str, Any]:
    """One contender: {"about", "load_seconds", "readings": [{"size", "quiet", "busy", "foreign_cores"}]}."""
    readings: list[dict[str, Any]] = []
    session: dict[str, Any] = {}
    try:
        with EngineProcess(f"neighbours-{name}", CONTENDERS[name], arguments.threads, arguments.limit) as engine:
            session = engine.load()
            engine.generate(random_prompts(max(batches), INPUT_TOKENS, [1]), 8)
            for batch in batches:
                reading: dict[str, Any] = {"size": batch, "quiet": [], "busy": [], "foreign_cores": []}
                readings.append(reading)
                for repeat in range(arguments.repeats):
                    prompts = random_prompts(batch, INPUT_TOKENS, [2, batch, repeat])
                    machine.wait_until_quiet(arguments.patience)
                    reading["quiet"].append(decode_rate(engine.generate(prompts, OUTPUT_TOKENS)))
                    reading["foreign_cores"].append(round(engine.foreign[-1], 3))
                    started = time.monotonic()
                    with busy_core():
                        reading["busy"].append(decode_rate(engine.generate(prompts, OUTPUT_TOKENS)))
                    print(f"{name:15} batch {batch:3}  quiet {reading['quiet'][-1]:8.1f}  "
                          f"beside {reading['busy'][-1]:8.1f} tokens/s", flush=True)  # fmt: skip
                    if time.monotonic() - started > PATIENCE:
                        break
    except EngineFailed as error:
        if not readings or not readings[0]["busy"]:
            raise
        print(f"{name:15} stopped: {error}", file=sys.stderr, flush=True)
        session["stopped"] = str(error)  # what was measured until then stays
    return {**session, "readings": [reading for reading in readings if reading["busy"]]}


def main() -> None:
    arguments = settings.parse(settings.side_by_side(__doc__, rounds=1, repeats=3, limit=240.0))
    batches = BATCHES[:1] if arguments.quick else BATCHES
    names = chosen(arguments.only, {name: CONTENDERS[name] for name in NAMES})
    conditions = {
        "model": model.NAME, "batches": batches, "input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS,
        "rounds": arguments.rounds, "repeats": arguments.repeats, "threads": arguments.threads,
    }  # fmt: skip
    results = Results("neighbours", conditions, merge=arguments.merge, quick=arguments.quick)

    def session(name: str, turn: int) -> dict[str, Any]:
        return run_session(name, batches, arguments)

    take_turns(names, session, results, arguments)


if __name__ == "__main__":
    main()
