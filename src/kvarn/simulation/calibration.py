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
    """Requests that are handed over together, and some that come while those decode."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    newcomers: tuple[tuple[int, ...], ...] = ()
    """Prompt lengths of requests that want one token each; those of a group come together, groups some steps apart."""


WARM_UP = (Round(32, 64, 8), Round(1, 512, 2))
_NEWCOMERS = ((16,), (150,), (50, 40, 60), (90,), (30, 30))
PLAN = (
    *(
        Round(requests, length, 22, _NEWCOMERS)
        for requests, length in (
            (16, 50), (1, 400), (32, 100), (4, 60), (8, 300), (24, 40), (2, 100), (48, 60), (1, 40), (12, 150),
            (4, 400), (32, 40), (8, 60), (16, 200), (3, 200), (24, 100),
        )
    ),
    *(Round(1, length, 1) for length in (8, 32, 96, 256, 512)),
    Round(1, 1500, 8),
)  # fmt: skip
"""What serving does: few and many readers of short and of long contexts, and prompts beside them and alone.

In no order of size, so that a machine whose speed drifts makes no sort of step look slow.
"""
_APART = 4
"""Steps without a prompt before each group."""


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


def time_steps(engine: Engine, *, repeats: int = 2, on_round: Callable[[], None] = lambda: None) -> list[StepSample]:
    """Run `PLAN` on an idle engine, `repeats` times after a warm-up; every step that computed something.

    The engine must share no prefixes and speculate nothing. `on_round` is called after each of the
    repeats * len(PLAN) rounds.
    """
    watch = _Watch(engine.executor)
    engine.executor = watch
    rng = np.random.default_rng(0)
    samples: list[StepSample] = []
    try:
        for one in WARM_UP:
            list(_steps(engine, watch, one, rng))
        for _ in range(repeats):
            for one in PLAN:
                samples.extend(_steps(engine, watch, one, rng))
                on_round()
    finally:
        engine.executor = watch.executor
    return samples


def _steps(engine: Engine, watch: _Watch, one: Round, rng: np.random.Generator) -> Iterator[StepSample]:
    if one.prompt_tokens + one.output_tokens > engine.max_context:
        return
    for number in range(min(one.requests, engine.max_running)):
        _add(engine, f"calibrate-{number}", one.prompt_tokens, one.output_tokens, rng)
    newcomers, decoded = list(one.newcomers), 0
    while engine.has_work:
        started, forward = perf_counter(), watch.forward_seconds
        engine.step()
        if watch.work.tokens:
            yield StepSample(watch.work, perf_counter() - started, watch.forward_seconds - forward)
        decoded = 0 if watch.work.chunks else decoded + 1
        if newcomers and decoded == _APART:
            decoded = 0
            for number, prompt_tokens in enumerate(newcomers.pop(0)):
                _add(engine, f"calibrate-newcomer-{number}", prompt_tokens, 1, rng)
        watch.work = Work()


def _add(engine: Engine, id: str, prompt_tokens: int, output_tokens: int, rng: np.random.Generator) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    prompt = rng.integers(0, engine.vocab_size, prompt_tokens).astype(np.int32)
    engine.add(Request.create(id, prompt, params, arrival=engine.clock.now()))
