"""Fits an accelerator's shares and overheads to steps that were timed: samples in, a profile and its error out.

What a step takes beside its forward pass gives two overheads. What the forward pass takes is linear in the third, that
of a prompt, and in the inverses of the four shares that terms of the roofline reach of their peaks; which side of each
maximum a step is on depends on the shares, so both are found in turns. Errors count relatively, because a step of 5 ms
is waited for as often as one of 500; relatively to what is modelled, because relatively to what was measured a quick
step would count more than a slow one of the same sort, and everything would be modelled too fast. Very large errors
count little, because other programs interrupt some steps. A term that the samples say nothing of keeps its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import KvarnError
from kvarn.hardware.accelerators import Accelerator
from kvarn.hardware.roofline import Roofline, Work, query_key_pairs

_ROUNDS = 40
_FEWEST = 12
_OUTLIER = 0.1
"""Relative error from which on a sample counts less."""
_OVERHEADS = ("step_seconds", "sequence_seconds")
_SHARES = ("weights_share", "compute_share", "kv_share", "attention_share")
_SORTS = (
    "1-4 requests decoding", "5-16 requests decoding", "more requests decoding", "prompts beside them", "prompts alone"
)  # fmt: skip
_TERMS = ("chunk_seconds", *_SHARES)
_Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StepSample:
    """One step as it was."""

    work: Work
    seconds: float
    forward_seconds: float
    """Of those, in the model."""


@dataclass(frozen=True)
class Regime:
    """How well steps of one sort are modelled; errors as in `Fit`."""

    name: str
    steps: int
    median_error: float
    total_error: float


@dataclass(frozen=True)
class Fit:
    """What came of it."""

    accelerator: Accelerator
    fitted: tuple[str, ...]
    """The fields that the samples determine; the others are as they were."""
    median_error: float
    """Of the step times, relative; half of the steps are nearer."""
    p90_error: float
    total_error: float
    """Of all modelled seconds together, relative to all measured ones; positive when the model is slow."""
    regimes: tuple[Regime, ...]
    """The same of each sort of step that was among the samples."""


def fit(samples: Sequence[StepSample], start: Roofline) -> Fit:
    """Fit `start`'s accelerator to the samples; KvarnError when there are too few to say anything."""
    if len(samples) < _FEWEST:
        raise KvarnError(f"{len(samples)} timed steps are too few to fit a profile; {_FEWEST} are needed")
    seconds = np.array([sample.seconds for sample in samples])
    forward = np.array([sample.forward_seconds for sample in samples])
    beside = seconds - forward
    counts = np.array([[1.0, sample.work.sequences] for sample in samples])
    roofline, fitted = start, tuple[str, ...]()
    weights, outer = 1 / seconds, 1 / seconds
    usual = np.array([start.accelerator.chunk_seconds, *(1 / getattr(start.accelerator, name) for name in _SHARES)])
    for _ in range(_ROUNDS):
        overheads, _ = _solve(counts, beside, outer, np.zeros(len(_OVERHEADS)))
        costs = np.array([_costs(roofline, sample.work) for sample in samples])
        terms, free = _solve(costs, forward, weights, usual)
        fitted = tuple(_TERMS[i] for i in free)
        inside, outside = costs @ terms, counts @ overheads
        modelled = inside + outside
        weights = _trust(np.abs(inside - forward) / modelled) / modelled
        outer = _trust(np.abs(outside - beside) / modelled) / modelled
        roofline = _with_values(roofline, overheads, terms)
    modelled = np.array([roofline.step_seconds(sample.work) for sample in samples])
    errors = np.abs(modelled / seconds - 1)
    median, p90 = (float(error) for error in np.percentile(errors, (50, 90)))
    sorts = np.array([_sort_of(sample.work) for sample in samples])
    regimes = tuple(
        Regime(name, int(own.sum()), float(np.median(errors[own])), _total_error(modelled[own], seconds[own]))
        for name in _SORTS
        if (own := sorts == name).any()
    )
    total = _total_error(modelled, seconds)
    return Fit(roofline.accelerator, (*_OVERHEADS, *fitted), median, p90, total, regimes)


def _sort_of(work: Work) -> str:
    """Which of `_SORTS` a step is."""
    if work.chunks:
        return _SORTS[3] if work.decodes else _SORTS[4]
    return _SORTS[0 if work.decodes <= 4 else 1 if work.decodes <= 16 else 2]


def _total_error(modelled: _Matrix, seconds: _Matrix) -> float:
    return float(modelled.sum() / seconds.sum() - 1)


def _trust(errors: _Matrix) -> _Matrix:
    """Square roots of what samples with these relative errors count for."""
    return np.sqrt(np.minimum(1.0, _OUTLIER / np.maximum(errors, 1e-9)))


def _with_values(roofline: Roofline, overheads: _Matrix, terms: _Matrix) -> Roofline:
    values = {name: float(value) for name, value in zip(_OVERHEADS, overheads, strict=True)}
    values["chunk_seconds"] = float(terms[0])
    values |= {name: float(1 / value) for name, value in zip(_SHARES, terms[1:], strict=True)}
    accelerator = replace(roofline.accelerator, **values)  # type: ignore[arg-type]
    return Roofline(accelerator, roofline.model, weight_bytes=roofline.weight_bytes, kv_bytes=roofline.kv_bytes)


def _costs(roofline: Roofline, work: Work) -> list[float]:
    """What a forward pass counts for by `_TERMS`: prompts, then seconds at the peaks by the share that slows each."""
    device, model = roofline.accelerator, roofline.model
    read = roofline.weight_bytes / device.memory_bandwidth
    kv = model.kv_bytes_per_token(roofline.kv_bytes) / device.memory_bandwidth
    pair = model.attention_flops / device.flops
    linear = [(model.layer_weights * read, work.tokens * model.linear_flops / device.flops)]
    if work.sampled:
        linear.append((model.head_weights * read, work.sampled * model.head_flops / device.flops))
    attention = [(work.decode_context * kv, work.decode_context * pair)]
    attention += [((past + count) * kv, query_key_pairs(past, count) * pair) for past, count in work.chunks]
    costs = dict.fromkeys(_SHARES, 0.0)
    for terms, read_share, compute_share, overlap in (
        (linear, "weights_share", "compute_share", device.overlap),
        (attention, "kv_share", "attention_share", True),
    ):
        for reading, computing in terms:
            reads = reading / getattr(device, read_share) > computing / getattr(device, compute_share)
            costs[read_share] += reading if reads or not overlap else 0.0
            costs[compute_share] += computing if not (reads and overlap) else 0.0
    return [float(len(work.chunks)), *costs.values()]


def _solve(costs: _Matrix, seconds: _Matrix, weights: _Matrix, usual: _Matrix) -> tuple[_Matrix, list[int]]:
    """Weighted least squares; what comes out negative, or is in no sample, is held at its usual value.

    Values of shape (costs.shape[1],), and the numbers of those that were free.
    """
    values = usual.copy()
    free = [i for i in range(costs.shape[1]) if costs[:, i].any()]
    while free:
        rest = seconds - np.delete(costs, free, axis=1) @ np.delete(usual, free)
        found = np.linalg.lstsq(costs[:, free] * weights[:, None], rest * weights, rcond=None)[0]
        worst = int(np.argmin(found * costs[:, free].max(axis=0)))
        if found[worst] > 0:
            values[free] = found
            break
        del free[worst]
    return values, free
