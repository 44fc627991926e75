"""Speed of an engine without a server: batches in, decode and prefill rates out.

The definitions are the same for every engine that is compared (`benchmarks/offline.py` uses these functions on
other systems' token times too). *Decode* counts the tokens made after every sequence of the batch has its first
one, over the time from then to the last token: no prefill is in it. *Prefill* is prompt tokens over the time from
handing the batch in to the moment the last sequence has its first token. Prompts are random, so nothing is cached.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from kvarn.bench.prompts import DEFAULT_TOKENS
from kvarn.errors import KvarnError

TokenTimes = Sequence[Sequence[float]]
"""Seconds after the batch was handed in at which each sequence got each of its tokens."""
Generate = Callable[[list[list[int]], int], TokenTimes]
"""(prompts as token ids, output tokens) -> token times; greedy, end-of-sequence ignored."""


@dataclass(frozen=True)
class Workload:
    """What to measure; lengths in tokens."""

    batches: tuple[int, ...] = (1, 4, 16, 32)
    input_tokens: int = 128
    output_tokens: int = 128
    prefills: tuple[int, ...] = (512, 2048)
    repeats: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Reading:
    """One figure with its repeats, in tokens per second."""

    kind: str
    """"decode" or "prefill"."""
    size: int
    """Sequences in the batch for decode, prompt tokens for prefill."""
    tokens_per_second: float
    """Median of `repeats`."""
    repeats: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def decode_rate(times: TokenTimes) -> float:
    """Tokens per second once every sequence has its first token."""
    begun = max(sequence[0] for sequence in times)
    ended = max(sequence[-1] for sequence in times)
    made = sum(moment > begun for sequence in times for moment in sequence)
    if not made:
        raise KvarnError("decode speed needs at least 2 output tokens")
    return made / (ended - begun)


def prefill_rate(times: TokenTimes, prompt_tokens: int) -> float:
    """Prompt tokens (of all sequences together) per second until every sequence has its first token."""
    return prompt_tokens / max(sequence[0] for sequence in times)


def random_prompts(batch: int, length: int, seed: Sequence[int]) -> list[list[int]]:
    """`batch` prompts of `length` token ids that share nothing."""
    prompts: list[list[int]] = np.random.default_rng(seed).integers(*DEFAULT_TOKENS, (batch, length)).tolist()
    return prompts


def measure(
    generate: Generate,
    workload: Workload,
    *,
    on_reading: Callable[[Reading], None] = lambda reading: None,
    before_run: Callable[[], None] = lambda: None,
) -> list[Reading]:
    """Warm up, then measure every batch size and prompt length, `repeats` times each with new prompts.

    `before_run` is called before each timed run (to look at the machine's load).
    """
    warm_up_tokens = min(workload.input_tokens, 32)
    generate(random_prompts(max(workload.batches), warm_up_tokens, [workload.seed, 0]), 8)
    readings = []

    def take(kind: str, size: int, rate: Callable[[int], float]) -> None:
        rates = []
        for repeat in range(workload.repeats):
            before_run()
            rates.append(rate(repeat))
        readings.append(Reading(kind, size, median(rates), tuple(rates)))
        on_reading(readings[-1])

    def decode(batch: int, repeat: int) -> float:
        prompts = random_prompts(batch, workload.input_tokens, [workload.seed, 1, batch, repeat])
        return decode_rate(generate(prompts, workload.output_tokens))

    def prefill(length: int, repeat: int) -> float:
        prompts = random_prompts(1, length, [workload.seed, 2, length, repeat])
        return prefill_rate(generate(prompts, 1), length)

    for batch in workload.batches:
        take("decode", batch, lambda repeat, batch=batch: decode(batch, repeat))  # type: ignore[misc]
    for length in workload.prefills:
        take("prefill", length, lambda repeat, length=length: prefill(length, repeat))  # type: ignore[misc]
    return readings


@dataclass(frozen=True)
class KvarnEngine:
    """kvarn's own engine in this process, and what it chose where it was asked to."""

    generate: Generate
    load_seconds: float
    precision: str
    """Of the weights."""
    kv_dtype: str
    """Of cached keys and values."""


def kvarn_engine(model: str, precision: str, **settings: Any) -> KvarnEngine:
    """Load kvarn's own engine; arguments as for `OfflineEngine.load`.

    It does not speculate: after random prompts a greedy model soon repeats itself, and drafting that is no measure.
    """
    from kvarn.serving.offline import OfflineEngine
    from kvarn.serving.sampling.params import SamplingParams

    started = time.perf_counter()
    engine = OfflineEngine.load(model, precision=precision, speculation="off", **settings)
    load_seconds = time.perf_counter() - started

    def generate(prompts: list[list[int]], output_tokens: int) -> TokenTimes:
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        return [one.token_times for one in engine.generate(prompts, [params] * len(prompts))]

    kv_dtype = str(engine.kv_dtype).removeprefix("torch.")
    return KvarnEngine(generate, load_seconds, engine.spec.precision, kv_dtype)
