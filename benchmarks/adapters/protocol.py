"""How a benchmark talks to an engine in another environment: one JSON object a line, over stdin and stdout.

    <- {"model": path, "threads": n, ...}          once: what to load (Contender.order)
    -> {"about": {...}, "load_seconds": s}
    <- {"prompts": [[ids]], "output_tokens": n}    any number of times
    -> {"times": [[seconds]], "tokens": [[ids]]}   one entry a sequence, seconds from taking the batch in
    -> {"error": "..."}                            instead of any answer; then the process ends

Standard library only: it runs in every peer's environment. Whatever an engine prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Generated:
    """Tokens of one batch and when they came, filled in as an engine makes them."""

    sequences: int
    started: float = field(default_factory=time.perf_counter)
    times: list[list[float]] = field(init=False)
    tokens: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.times = [[] for _ in range(self.sequences)]
        self.tokens = [[] for _ in range(self.sequences)]

    def add(self, sequence: int, tokens: Iterable[int], moment: float | None = None) -> None:
        """Note tokens that have just come (or came at `moment` on time.perf_counter)."""
        now = (time.perf_counter() if moment is None else moment) - self.started
        for token in tokens:
            self.tokens[sequence].append(int(token))
            self.times[sequence].append(now)


Generate = Callable[[list[list[int]], int], Generated]
Load = Callable[[dict[str, Any]], tuple[Generate, dict[str, Any]]]


def serve(load: Load) -> None:
    """Answer the benchmark until it closes our stdin. `load` gives the engine and what to say about it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        settings = json.loads(sys.stdin.readline())
        started = time.perf_counter()
        generate, about = load(settings)
        answer({"about": about, "load_seconds": time.perf_counter() - started})
        for line in sys.stdin:
            order = json.loads(line)
            made = generate(order["prompts"], order["output_tokens"])
            answer({"times": made.times, "tokens": made.tokens})
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
    # The end is an ordinary one, and so is SIGTERM's: engines give back shared memory and processes of their own.
