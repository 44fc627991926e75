"""Workloads: who asks for how much, when. Seeds and sizes in, a list of `RequestSpec` out, sorted by arrival.

An arrival process (`Burst`, `Poisson`, `Gamma`, `Diurnal`) and two length distributions (`Fixed`, `TruncatedNormal`,
`LogNormal`) make a synthetic workload; `kvarn.simulation.traces` reads recorded ones. The same seed gives the same
workload on every machine; arrivals, lengths and clients are drawn from streams of their own, so changing one leaves
the others as they were. Nothing here knows what a request says: content is made by whoever sends it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import KvarnError
from kvarn.serving.rounds.hints import RoundHint, Segment

Seconds = NDArray[np.float64]
Counts = NDArray[np.int64]


class WorkloadError(KvarnError):
    """A workload is asked for that cannot exist: no requests, a negative rate, an unreadable trace."""


@dataclass(frozen=True, slots=True)
class SegmentSpec:
    """A part of a prompt to come."""

    segment: Segment
    content: int = 0
    """What a shared part says: equal ones are equal."""


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One request to come: its size and time, not its words."""

    arrival: float
    """Seconds after the workload starts."""
    prompt_tokens: int
    output_tokens: int
    stream_rate: float | None = None
    """Tokens per second its reader consumes; None where nothing is known of the reader."""
    declared_rate: float | None = None
    """Tokens per second that the client says its reader consumes; None where it tells the truth."""
    max_tokens: int | None = None
    """Tokens that the client asks for at most, of which the engine knows; None: exactly as many as it gets."""
    prefix_ids: tuple[int, ...] = ()
    """One id per `prefix_block_tokens` of the prompt, chained: equal leading ids mean an equal prefix."""
    prefix_block_tokens: int = 512
    session: str | None = None
    """Conversation or agent this request belongs to."""
    leaves_after: float | None = None
    """Seconds after its arrival at which the client goes, whatever it has got by then; None where it stays."""
    segments: tuple[SegmentSpec, ...] = ()
    """The parts of its prompt, which they cover; empty where nothing is known of them."""
    round: RoundHint | None = None
    """The round it belongs to."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.arrival) and self.arrival >= 0):
            raise WorkloadError(f"arrival is {self.arrival}; expected seconds from 0 on")
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise WorkloadError(
                f"a request of {self.prompt_tokens} prompt and {self.output_tokens} output tokens; expected 1 or more"
            )
        if self.max_tokens is not None and self.max_tokens < self.output_tokens:
            raise WorkloadError(
                f"max_tokens is {self.max_tokens}; expected output_tokens ({self.output_tokens}) or more"
            )
        for name in ("stream_rate", "declared_rate"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise WorkloadError(f"{name} is {rate}; expected tokens per second above 0, or None")
        lengths = [part.segment.tokens for part in self.segments]
        if lengths and (sum(lengths) != self.prompt_tokens or min(lengths) < 1):
            raise WorkloadError(f"segments of {lengths} tokens; expected 1 or more, and {self.prompt_tokens} in all")
        if self.leaves_after is not None and not self.leaves_after > 0:
            raise WorkloadError(f"leaves_after is {self.leaves_after}; expected seconds above 0, or None")


class Arrivals(Protocol):
    """A process that says when requests come."""

    def times(self, count: int, rng: np.random.Generator) -> Seconds:
        """Ascending arrival times in seconds, shape (count,)."""


class Lengths(Protocol):
    """A distribution of token counts."""

    def draw(self, count: int, rng: np.random.Generator) -> Counts:
        """Token counts of at least 1, shape (count,)."""


@dataclass(frozen=True)
class Burst:
    """All requests at once, or evenly spread at random over the first `within` seconds."""

    within: float = 0.0

    def __post_init__(self) -> None:
        _require("within", self.within, self.within >= 0, "seconds from 0 on")

    def times(self, count: int, rng: np.random.Generator) -> Seconds:
        return np.sort(rng.uniform(0.0, self.within, count)) if self.within else np.zeros(count)


@dataclass(frozen=True)
class Gamma:
    """Independent gaps of mean 1 / `rate` seconds and coefficient of variation `cv`: clumped above 1, regular below."""

    rate: float
    cv: float = 1.0

    def __post_init__(self) -> None:
        _require("rate", self.rate, self.rate > 0, "requests per second above 0")
        _require("cv", self.cv, self.cv > 0, "a number above 0")

    def times(self, count: int, rng: np.random.Generator) -> Seconds:
        shape = self.cv**-2
        gaps = rng.gamma(shape, 1.0 / (self.rate * shape), count)
        gaps[:1] = 0.0  # the clock starts with the first request
        return np.cumsum(gaps)


@dataclass(frozen=True)
class Poisson:
    """Independent requests at `rate` per second on average: Gamma gaps with cv 1."""

    rate: float

    def __post_init__(self) -> None:
        _require("rate", self.rate, self.rate > 0, "requests per second above 0")

    def times(self, count: int, rng: np.random.Generator) -> Seconds:
        return Gamma(self.rate).times(count, rng)


@dataclass(frozen=True)
class Diurnal:
    """Days and nights, and bursts within: Gamma gaps of variation `cv` whose rate swings around `rate` as a sine.

    The rate at second t is rate * (1 + swing * sin(2 pi t / period)): it rises first. Source: the shape of BurstGPT's
    load (arXiv 2401.17644), whose arrivals follow Gamma processes of varying rate.
    """

    rate: float
    cv: float = 2.0
    period: float = 1200.0
    """Seconds of one day and night."""
    swing: float = 0.6
    """0 is a steady rate, 1 falls to nothing at night."""

    def __post_init__(self) -> None:
        _require("rate", self.rate, self.rate > 0, "requests per second above 0")
        _require("period", self.period, self.period > 0, "seconds above 0")
        _require("swing", self.swing, 0 <= self.swing < 1, "a share from 0 to below 1")

    def times(self, count: int, rng: np.random.Generator) -> Seconds:
        # Steady arrivals at rate 1, then time stretched so that expected requests pass at that pace.
        expected = Gamma(1.0, self.cv).times(count, rng)
        pulse = self.rate * self.period * self.swing / (2 * math.pi)
        end = (expected[-1] + 2 * pulse) / self.rate + self.period if count else 0.0
        grid = np.linspace(0.0, end, max(1024, int(256 * end / self.period)))
        passed = self.rate * grid + pulse * (1 - np.cos(2 * math.pi * grid / self.period))
        return np.interp(expected, passed, grid)


@dataclass(frozen=True)
class Fixed:
    """Every request has the same number of tokens."""

    tokens: int

    def __post_init__(self) -> None:
        _require("tokens", self.tokens, self.tokens >= 1, "at least 1")

    def draw(self, count: int, rng: np.random.Generator) -> Counts:
        return np.full(count, self.tokens, dtype=np.int64)


@dataclass(frozen=True)
class TruncatedNormal:
    """Normal with `mean` and `deviation` tokens, conditioned on [`low`, `high`]: cut, not clipped to the edges."""

    mean: float
    deviation: float
    low: int = 1
    high: int = 1_000_000

    def __post_init__(self) -> None:
        _require("deviation", self.deviation, self.deviation > 0, "tokens above 0 (use Fixed for one length)")
        _require("low", self.low, 1 <= self.low <= self.high, f"at least 1 and at most high ({self.high})")
        _require("mean", self.mean, self.low <= self.mean <= self.high, f"between {self.low} and {self.high}")

    def draw(self, count: int, rng: np.random.Generator) -> Counts:
        # By the inverse of the distribution function: exact however narrow the interval, one draw per request.
        normal = NormalDist(self.mean, self.deviation)
        uniforms = rng.uniform(normal.cdf(self.low), normal.cdf(self.high), count)
        values = [normal.inv_cdf(u) if 0.0 < u < 1.0 else self.mean for u in uniforms]
        return np.clip(np.rint(values), self.low, self.high).astype(np.int64)


@dataclass(frozen=True)
class LogNormal:
    """Many short and few long: the logarithm is normal with deviation `sigma`; conditioned on [`low`, `high`]."""

    median: float
    sigma: float
    low: int = 1
    high: int = 1_000_000

    def __post_init__(self) -> None:
        _require("sigma", self.sigma, self.sigma > 0, "a number above 0 (use Fixed for one length)")
        _require("low", self.low, 1 <= self.low <= self.high, f"at least 1 and at most high ({self.high})")
        _require("median", self.median, self.low <= self.median <= self.high, f"between {self.low} and {self.high}")

    def draw(self, count: int, rng: np.random.Generator) -> Counts:
        normal = NormalDist(math.log(self.median), self.sigma)
        uniforms = rng.uniform(normal.cdf(math.log(self.low)), normal.cdf(math.log(self.high)), count)
        values = [math.exp(normal.inv_cdf(u)) if 0.0 < u < 1.0 else self.median for u in uniforms]
        return np.clip(np.rint(values), self.low, self.high).astype(np.int64)


def synthesize(
    count: int,
    arrivals: Arrivals,
    prompt: Lengths,
    output: Lengths,
    *,
    stream_rate: float | None = None,
    seed: int = 0,
) -> list[RequestSpec]:
    """`count` requests with the given arrivals and lengths (tokens), read at `stream_rate` tokens per second."""
    _require("count", count, count >= 1, "at least 1 request")
    times = arrivals.times(count, np.random.default_rng([seed, 0]))
    prompts = prompt.draw(count, np.random.default_rng([seed, 1]))
    outputs = output.draw(count, np.random.default_rng([seed, 2]))
    return [
        RequestSpec(float(time), int(prompt_tokens), int(output_tokens), stream_rate)
        for time, prompt_tokens, output_tokens in zip(times, prompts, outputs, strict=True)
    ]


def with_arrivals(specs: Sequence[RequestSpec], arrivals: Arrivals, *, seed: int = 0) -> list[RequestSpec]:
    """The same requests in the same order at new times."""
    times = arrivals.times(len(specs), np.random.default_rng([seed, 0]))
    return [replace(spec, arrival=float(time)) for spec, time in zip(specs, times, strict=True)]


def with_readers(
    specs: Sequence[RequestSpec], classes: Sequence[tuple[float, float]], *, seed: int = 0
) -> list[RequestSpec]:
    """The same requests with readers drawn from `classes`: (weight, tokens per second) each."""
    weights = np.array([weight for weight, _ in classes], dtype=np.float64)
    _require("reader classes", list(classes), len(classes) > 0 and bool((weights > 0).all()), "weights above 0")
    chosen = np.random.default_rng([seed, 3]).choice(len(classes), len(specs), p=weights / weights.sum())
    return [replace(spec, stream_rate=classes[which][1]) for spec, which in zip(specs, chosen, strict=True)]


def with_departures(
    specs: Sequence[RequestSpec], share: float, mean_seconds: float, *, seed: int = 0
) -> list[RequestSpec]:
    """The same requests, of which a `share` leaves after exponentially distributed seconds, done or not."""
    _require("share", share, 0 <= share <= 1, "a share from 0 to 1")
    _require("mean_seconds", mean_seconds, mean_seconds > 0, "seconds above 0")
    rng = np.random.default_rng([seed, 4])
    leaving, patience = rng.random(len(specs)) < share, rng.exponential(mean_seconds, len(specs))
    return [
        replace(spec, leaves_after=max(float(seconds), 1e-3)) if leaves else spec
        for spec, leaves, seconds in zip(specs, leaving, patience, strict=True)
    ]


def replay(
    specs: Sequence[RequestSpec],
    *,
    limit: int | None = None,
    speed: float = 1.0,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
    stream_rate: float | None = None,
) -> list[RequestSpec]:
    """Fit a trace to a machine: its first `limit` requests, `speed` times as fast, lengths cut to the maxima.

    Arrivals start at 0. `stream_rate` (tokens per second) fills in where the trace does not know the reader.
    """
    _require("speed", speed, speed > 0, "a factor above 0")
    _require("limit", limit, limit is None or limit >= 1, "at least 1 request")
    chosen = sorted(specs, key=lambda spec: spec.arrival)[:limit]
    if not chosen:
        raise WorkloadError("the trace holds no usable request; check that the file is of the format named")
    start = chosen[0].arrival
    return [
        replace(
            spec,
            arrival=(spec.arrival - start) / speed,
            prompt_tokens=min(spec.prompt_tokens, max_prompt_tokens or spec.prompt_tokens),
            output_tokens=min(spec.output_tokens, max_output_tokens or spec.output_tokens),
            stream_rate=spec.stream_rate or stream_rate,
        )
        for spec in chosen
    ]


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:  # a NaN holds nothing
        raise WorkloadError(f"{name} is {value}; expected {expected}")
