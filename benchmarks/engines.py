"""An engine in a process and an environment of its own, spoken to over `benchmarks/adapters/protocol.py`."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any, Self

from benchmarks import machine, peers
from benchmarks.contenders import Contender

from kvarn.bench.offline import TokenTimes, random_prompts

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / ".cache" / "benchmarks"
SAMPLE_TOKENS = 8
OURS = {"PYTHONPATH": str(ROOT / "src"), "GOMP_SPINCOUNT": "2000"}
"""kvarn from this checkout, its OpenMP threads as `kvarn serve` sets them for its engine process."""


class EngineFailed(Exception):
    """The engine's process reported an error, ended or ran out of time."""


class EngineProcess:
    """One contender, loaded; a context manager that leaves no process behind."""

    def __init__(self, name: str, contender: Contender, threads: int, limit: float) -> None:
        """`limit`: seconds the whole session may take. `name` is for its log."""
        LOGS.mkdir(parents=True, exist_ok=True)
        self._contender, self._threads = contender, threads
        self._log = (LOGS / f"engine-{name}.log").open("w")
        ours = OURS if contender.system == "kvarn" else {}
        self._process = subprocess.Popen(
            [str(peers.python_of(contender.system)), "-m", f"benchmarks.adapters.{contender.system}"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)} | ours,
            start_new_session=True,
        )  # fmt: skip
        self._timer = threading.Timer(limit, peers.stop_group, [self._process])
        self._timer.start()
        self.foreign: list[float] = []
        """Foreign load in cores during each batch."""

    def load(self) -> dict[str, Any]:
        """Load the model; what there is to say about the engine, and `load_seconds`."""
        session = self._ask(self._contender.order(self._threads))
        session["about"] |= {"label": self._contender.label, "weights": self._contender.weights}
        return session

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
