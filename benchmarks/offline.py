"""Offline speed side by side: kvarn, vLLM, OpenVINO GenAI, llama.cpp and transformers on the same weights.

    python -m benchmarks.offline                         all installed engines, about ten minutes
    python -m benchmarks.offline --quick                 small settings: does everything run?
    python -m benchmarks.offline --only kvarn --merge    measure some again, keep the others' figures

Each engine runs alone, in a process of its own environment (`benchmarks/adapters`), never two at once. The engines
take turns over two rounds, the second in reverse order, so that a slow drift of the machine hits none in particular.
Figures and their definitions: `kvarn.bench.offline`. Before each run we wait for other processes to be quiet; how
busy they were during it is recorded. Results: `benchmarks/results/offline.json` and `.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from benchmarks import machine, model, peers, render
from benchmarks.results import Results

from kvarn.bench.offline import Reading, TokenTimes, Workload, measure, random_prompts

ENGINES = ("kvarn", "vllm", "openvino", "llamacpp", "transformers")
ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / ".cache" / "benchmarks"
SAMPLE_TOKENS = 8


class EngineFailed(Exception):
    """The engine's process reported an error, ended or ran out of time."""


class EngineProcess:
    """One engine in its own environment; a context manager that leaves no process behind."""

    def __init__(self, name: str, threads: int, limit: float) -> None:
        """`limit`: seconds the whole session may take."""
        LOGS.mkdir(parents=True, exist_ok=True)
        self._log = (LOGS / f"offline-{name}.log").open("w")
        own_path = {"PYTHONPATH": str(ROOT / "src")} if name == "kvarn" else {}
        self._process = subprocess.Popen(
            [str(peers.python_of(name)), "-m", f"benchmarks.adapters.{name}"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)} | own_path,
            start_new_session=True,
        )  # fmt: skip
        self._timer = threading.Timer(limit, peers.stop_group, [self._process])
        self._timer.start()
        self._threads = threads
        self.foreign: list[float] = []
        """Foreign load in cores during each batch."""

    def load(self) -> dict[str, Any]:
        """Load the model; what the engine says about itself, and `load_seconds`."""
        return self._ask({
            "model": str(model.hf_folder()),
            "gguf_bf16": str(model.gguf_file("bf16")),
            "gguf_f16": str(model.gguf_file("f16")),
            "threads": self._threads,
        })  # fmt: skip

    def generate(self, prompts: list[list[int]], output_tokens: int) -> TokenTimes:
        """Run one batch; every sequence must come back with every token."""
        load = machine.ForeignLoad()
        times: TokenTimes = self._ask({"prompts": prompts, "output_tokens": output_tokens})["times"]
        self.foreign.append(load.cores())
        if [len(sequence) for sequence in times] != [output_tokens] * len(prompts):
            raise EngineFailed(f"wanted {output_tokens} tokens a sequence, got {[len(one) for one in times]}")
        return times

    def sample(self) -> list[int]:
        """The first tokens after a fixed prompt: engines that compute the same agree on most of them."""
        tokens: list[list[int]] = self._ask({"prompts": random_prompts(1, 32, [0]), "output_tokens": SAMPLE_TOKENS})[
            "tokens"
        ]
        return tokens[0]

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it said before is still to be read
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"ended or out of time; see {Path(self._log.name).name}"}
        if "error" in answer:
            raise EngineFailed(answer["error"])
        return dict(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        peers.stop_group(self._process)
        self._log.close()


def run_session(name: str, workload: Workload, threads: int, limit: float, patience: float) -> dict[str, Any]:
    """One engine measured once through: {"about", "load_seconds", "sample", "readings"} or {"error"}."""

    def show(reading: Reading) -> None:
        print(f"{name:13} {reading.kind:8} {reading.size:5}  {reading.tokens_per_second:10,.1f} tokens/s", flush=True)

    try:
        with EngineProcess(name, threads, limit) as engine:
            session = engine.load()
            print(f"{name:13} loaded in {session['load_seconds']:.1f} s", flush=True)
            readings = measure(
                engine.generate,
                workload,
                on_reading=show,
                before_run=lambda: machine.wait_until_quiet(patience) and None,
            )
            foreign = iter(engine.foreign[1:])  # the first batch is the warm-up
            rows = [
                {**reading.to_json(), "foreign_cores": [round(next(foreign), 3) for _ in reading.repeats]}
                for reading in readings
            ]
            return {**session, "sample": engine.sample(), "readings": rows}
    except (EngineFailed, FileNotFoundError) as error:
        print(f"{name:13} failed: {error}", file=sys.stderr, flush=True)
        return {"error": str(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ENGINES, help="measure these engines")
    parser.add_argument("--merge", action="store_true", help="keep the results of engines that are not measured now")
    parser.add_argument("--quick", action="store_true", help="tiny settings, results to .cache/benchmarks")
    parser.add_argument("--rounds", type=int, default=2, help="turns of every engine (default 2)")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each figure in a turn (default 2)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all processors")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds an engine's turn may take (default 300)")
    parser.add_argument(
        "--patience", type=float, default=20.0, help="seconds to wait for quiet before a run (default 20)"
    )
    arguments = parser.parse_args()
    shape = Workload(repeats=arguments.repeats)
    if arguments.quick:
        arguments.rounds = 1
        shape = Workload(batches=(1, 4), input_tokens=32, output_tokens=8, prefills=(128,), repeats=1)
    chosen = arguments.only or [name for name in ENGINES if name not in peers.PEERS or peers.is_installed(name)]
    conditions = {**asdict(shape), "rounds": arguments.rounds, "threads": arguments.threads, "model": model.NAME}
    results = Results("offline", conditions, merge=arguments.merge, quick=arguments.quick)
    started = time.monotonic()
    for turn in range(arguments.rounds):
        for name in chosen if turn % 2 == 0 else reversed(chosen):
            workload = Workload(**{**asdict(shape), "seed": turn})
            patience = 0.0 if arguments.quick else arguments.patience
            session = run_session(name, workload, arguments.threads, arguments.limit, patience)
            results.add_session(name, session, first=turn == 0)
    render.render(results.path)
    print(f"{time.monotonic() - started:.0f} s; written: {results.path} and {results.path.stem}.md")


if __name__ == "__main__":
    main()
