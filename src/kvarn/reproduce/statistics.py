"""Repeats in, an estimate with its interval out. Repeats are paired: the same seed gives both sides the same workload.

The estimate is the median. The interval is Student's, at 95 %, for ratios in their logarithms: it says how far repeats
differ, and with two of them it is as wide as two of them deserve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom."""
_NORMAL = 1.960


class Estimate(NamedTuple):
    """A figure and its 95 % interval; NaN where one repeat tells of none."""

    value: float
    low: float = math.nan
    high: float = math.nan


def level(values: Sequence[float]) -> Estimate:
    """Of repeats of one figure."""
    sample = np.asarray(values, dtype=np.float64)
    middle, reach = float(np.median(sample)), _reach(sample)
    return Estimate(middle, float(sample.mean()) - reach, float(sample.mean()) + reach)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Of ours less theirs, pairwise."""
    return level([a - b for a, b in zip(ours, theirs, strict=True)])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Of ours over theirs, pairwise; the interval is NaN where any is not above 0."""
    pairs = list(zip(ours, theirs, strict=True))
    ratios = [a / b if b else math.inf if a else 1.0 for a, b in pairs]
    if not all(0 < value < math.inf for value in ratios):
        return Estimate(float(np.median(ratios)))
    logarithms = level([math.log(value) for value in ratios])
    return Estimate(float(np.median(ratios)), math.exp(logarithms.low), math.exp(logarithms.high))


def _reach(sample: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """Half the width of the interval of a mean."""
    freedom = len(sample) - 1
    if freedom < 1:
        return math.nan
    quantile = _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else _NORMAL
    return quantile * float(sample.std(ddof=1)) / math.sqrt(len(sample))
