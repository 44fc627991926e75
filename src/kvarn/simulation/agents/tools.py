"""How long tools take: a table of kinds, and laws from which each call's seconds are drawn.

A law is a shape around a middle. The middle is a kind's own, from the table, or one for all kinds, as in a sweep over
gaps; a factor scales what comes out. Drawn by a generator that is handed in: the same seed, the same durations.

Source: TokenCake (arXiv 2510.18586), Table 1, for the kinds' latencies, and its Poisson-distributed durations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvarn.simulation.workloads import WorkloadError


@dataclass(frozen=True, slots=True)
class ToolKind:
    """What is usual of one kind of tool. Seconds."""

    name: str
    low: float
    high: float
    stages: tuple[str, ...] = ()
    """Parts of a call, in order."""

    @property
    def typical(self) -> float:
        """What a developer would say it takes: the middle of the range, by ratio."""
        return math.sqrt(self.low * self.high)


_KINDS = (
    # The paper's table, row by row ...
    ToolKind("file_system", 0.05, 0.2),
    ToolKind("git", 0.1, 1.0),
    ToolKind("sqlite", 0.1, 1.0),
    ToolKind("web_search", 1.0, 5.0),
    ToolKind("ai_generation", 5.0, 30.0),
    # ... and the kinds that its front end knows, each with the row that it is made of.
    ToolKind("file_read", 0.05, 0.2),
    ToolKind("file_write", 0.05, 0.2),
    ToolKind("file_query", 0.1, 1.0),
    ToolKind("search", 1.0, 5.0),
    ToolKind("data_analysis", 1.0, 5.0, ("query", "embed", "generate")),
    ToolKind("external_test", 5.0, 30.0),
    ToolKind("user_confirm", 5.0, 30.0),
    ToolKind("image_generation", 5.0, 30.0),
)
TOOLS = {kind.name: kind for kind in _KINDS}
UNKNOWN_TOOL_SECONDS = 1.0


def typical_seconds(kind: str) -> float:
    """What is usual of a kind; 1 s of one that the table does not know."""
    return TOOLS[kind].typical if kind in TOOLS else UNKNOWN_TOOL_SECONDS


class DurationLaw(Protocol):
    """A distribution of seconds."""

    def draw(self, kind: str, rng: np.random.Generator) -> float:
        """Seconds of one call, 0 or more."""
        ...

    def typical(self, kind: str) -> float:
        """What somebody who knows the tool, but not the call, would guess. Seconds."""
        ...


@dataclass(frozen=True)
class _Centred:
    """A law around a middle: seconds that hold for every kind, or each kind's own."""

    middle: float | None = None
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.middle is not None and not (math.isfinite(self.middle) and self.middle >= 0):
            raise WorkloadError(f"seconds of a duration law are {self.middle}; expected a number from 0 on")
        _require("factor", self.factor)

    def typical(self, kind: str) -> float:
        return self.factor * (typical_seconds(kind) if self.middle is None else self.middle)


@dataclass(frozen=True)
class FixedDuration(_Centred):
    """Every call of a kind takes the same."""

    def draw(self, kind: str, rng: np.random.Generator) -> float:
        return self.typical(kind)


@dataclass(frozen=True)
class PoissonDuration(_Centred):
    """As in the paper: whole seconds whose variance is their mean, so never far off, and often 0 for short tools."""

    def draw(self, kind: str, rng: np.random.Generator) -> float:
        return self.factor * float(rng.poisson(self.typical(kind) / self.factor))


@dataclass(frozen=True)
class LogNormalDuration(_Centred):
    """The middle is the median; the logarithm is normal with deviation `sigma`."""

    sigma: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("sigma", self.sigma)

    def draw(self, kind: str, rng: np.random.Generator) -> float:
        return self.typical(kind) * math.exp(self.sigma * float(rng.standard_normal()))


@dataclass(frozen=True)
class ParetoDuration(_Centred):
    """The middle is the median; above the least, P(d > x) falls as x^-alpha. Below alpha 2 the variance is infinite."""

    alpha: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("alpha", self.alpha)

    def draw(self, kind: str, rng: np.random.Generator) -> float:
        least = self.typical(kind) / 2 ** (1 / self.alpha)
        return least * math.exp(float(rng.standard_exponential()) / self.alpha)


@dataclass(frozen=True)
class RecordedDuration:
    """Durations drawn with replacement from a list of them, whatever the kind."""

    seconds: tuple[float, ...]
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.seconds or not all(math.isfinite(value) and value >= 0 for value in self.seconds):
            raise WorkloadError("recorded durations are seconds from 0 on, at least one of them")
        _require("factor", self.factor)

    def draw(self, kind: str, rng: np.random.Generator) -> float:
        return self.factor * self.seconds[int(rng.integers(len(self.seconds)))]

    def typical(self, kind: str) -> float:
        return self.factor * float(np.median(self.seconds))


def published_gaps(count: int = 10_000) -> tuple[float, ...]:
    """Gaps between an agent's calls with the shape that is published of real ones; no trace: a curve through points.

    86.46 % are within 1 s and 95.12 % within 10 s (of one coding agent's requests); of another, calls above a minute
    are 4 % in number and 85 % of all tool time; medians of 0.7 s are usual. Logarithms are laid evenly between those
    points, and the tail above a minute is as long as makes it 85 %, so between the points the shape is a guess.

    Source: discussion of vllm-project/router issue 285; the research note's section 7.
    """
    shares, seconds = [0.0, 0.5, 0.8646, 0.9512, 0.96], [0.02, 0.7, 1.0, 10.0, 60.0]
    body = (np.arange(round(0.96 * count)) + 0.5) / count
    gaps = np.exp(np.interp(body, shares, np.log(seconds)))
    # Evenly by logarithm from 60 s up to `longest`, whose mean is (longest - 60) / log(longest / 60).
    wanted = 0.85 / 0.15 * float(gaps.sum()) / (count - len(body))
    longest = _longest_with_mean(60.0, wanted)
    places = (np.arange(count - len(body)) + 0.5) / (count - len(body))
    return (*gaps.tolist(), *(60.0 * (longest / 60.0) ** places).tolist())


def _longest_with_mean(least: float, mean: float) -> float:
    """Upper end of a distribution even by logarithm above `least` with this mean."""
    low, high = least, 1e4 * max(mean, least)
    for _ in range(100):
        middle = (low + high) / 2
        ratio = middle / least
        low, high = (middle, high) if least * (ratio - 1) / math.log(ratio) < mean else (low, middle)
    return high


_LAWS: dict[str, Callable[[float | None, float | None], DurationLaw]] = {
    "poisson": lambda middle, shape: PoissonDuration(middle),
    "lognormal": lambda middle, shape: LogNormalDuration(middle, sigma=shape or 0.8),
    "pareto": lambda middle, shape: ParetoDuration(middle, alpha=shape or 1.2),
    "fixed": lambda middle, shape: FixedDuration(middle),
    "recorded": lambda middle, shape: RecordedDuration(published_gaps(), factor=middle or 1.0),
}
LAWS = tuple(_LAWS)


def parse_law(text: str) -> DurationLaw:
    """A law as one writes it: "poisson", "lognormal:2" (median in s), "pareto:2:1.1" (and its shape), "fixed:5".

    "recorded" is the published gaps, "recorded:0.5" half as long. Raises WorkloadError.
    """
    name, *numbers = text.split(":")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        name = ""
    if name not in _LAWS or len(numbers) > 2:
        raise WorkloadError(
            f"durations are {text!r}; expected one of {', '.join(LAWS)}, maybe with :seconds, such as lognormal:2"
        )
    middle, shape = [*values, None, None][:2]
    return _LAWS[name](middle, shape)


def _require(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise WorkloadError(f"{name} of a duration law is {value}; expected a number above 0")
