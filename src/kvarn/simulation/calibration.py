"""Times steps of the real engine on this machine, of all sorts that serving has, for `kvarn.simulation.fitting`.

The engine's own loop is timed, not the forward pass alone, so what scheduling and sampling cost is in the profile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from kvarn.hardware.roofline import Work
from kvarn.serving.batch import Batch, SampledToken
from kvarn.serving.engine import Engine
from kvarn.serving.executors.protocol import Executor
from kvarn.serving.request import Request
from kvarn.serving.sampling.params import SamplingParams
from kvarn.simulation.fitting import StepSample


@dataclass(frozen=True)
class Round:
    """Requests that are handed over together."""

    requests: int
    prompt_tokens: int
    output_tokens: int


WARM_UP = (Round(32, 64, 8), Round(1, 512, 2))
PLAN = (
    *(Round(requests, 24, 16) for requests in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)),
    *(Round(1, length, 1) for length in (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)),
    Round(1, 2000, 12), Round(4, 700, 12), Round(12, 200, 12),
)  # fmt: skip
"""Decoding alone and in batches, prompts alone and beside readers, short and long contexts."""


class _Watch:
    """An executor that remembers what its last batch was."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.work = Work()

    @property
    def num_blocks(self) -> int:
        return self.executor.num_blocks

    @property
    def forward_seconds(self) -> float:
        return self.executor.forward_seconds

    def add(self, request: Request) -> None:
        self.executor.add(request)

    def remove(self, request: Request) -> None:
        self.executor.remove(request)

    def execute(self, batch: Batch) -> list[list[SampledToken]]:
        self.work = Work.of(
            [(row.request.num_computed, row.count) for row in batch.rows], sum(row.samples for row in batch.rows)
        )
        return self.executor.execute(batch)


def time_steps(engine: Engine, *, repeats: int = 3, on_round: Callable[[], None] = lambda: None) -> list[StepSample]:
    """Run `PLAN` on an idle engine, `repeats` times after a warm-up; every step that computed something.

    A step comes again in every repeat, and the fastest counts: nothing else wanted the machine then. The engine must
    share no prefixes and speculate nothing. `on_round` is called after each of the repeats * len(PLAN) rounds.
    """
    watch = _Watch(engine.executor)
    engine.executor = watch
    rng = np.random.default_rng(0)
    turns: list[list[StepSample]] = []
    try:
        for one in WARM_UP:
            list(_steps(engine, watch, one, rng))
        for _ in range(repeats):
            turns.append([])
            for one in PLAN:
                turns[-1].extend(_steps(engine, watch, one, rng))
                on_round()
    finally:
        engine.executor = watch.executor
    return [min(same, key=lambda sample: sample.seconds) for same in zip(*turns, strict=True)]


def _steps(engine: Engine, watch: _Watch, one: Round, rng: np.random.Generator) -> Iterator[StepSample]:
    if one.prompt_tokens + one.output_tokens > engine.max_context:
        return
    params = SamplingParams(temperature=0.0, max_tokens=one.output_tokens, ignore_eos=True)
    for i in range(min(one.requests, engine.max_running)):
        prompt = rng.integers(0, engine.vocab_size, one.prompt_tokens).astype(np.int32)
        engine.add(Request.create(f"calibrate-{i}", prompt, params, arrival=engine.clock.now()))
    while engine.has_work:
        started, forward = perf_counter(), watch.forward_seconds
        engine.step()
        if watch.work.tokens:
            yield StepSample(watch.work, perf_counter() - started, watch.forward_seconds - forward)
        watch.work = Work()
