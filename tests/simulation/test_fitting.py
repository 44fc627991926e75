"""Fitting a profile: what made the samples is found again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvarn.errors import KvarnError
from kvarn.hardware.accelerators import Accelerator, load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.hardware.roofline import Roofline, Work
from kvarn.simulation.fitting import StepSample, fit

SHAPE = load_model_shape("smollm2")
CPU = load_accelerator("cpu")
TRUTH = replace(
    CPU, step_seconds=2e-3, sequence_seconds=7e-5, chunk_seconds=4e-3, weights_share=0.9, compute_share=0.5,
    kv_share=0.3, attention_share=0.2,
)  # fmt: skip
WORKS = [
    *(Work.of([(past, 1)] * rows, rows) for rows in (1, 2, 4, 8, 16, 32, 64) for past in (20, 400, 1500)),
    *(Work.of([(past, count)], 1) for past in (0, 512, 1500) for count in (8, 32, 128, 512)),
    *(Work.of([(300, 1)] * rows + [(64, 128 // n)] * n, rows) for rows in (1, 8, 30) for n in (1, 2, 4)),
]


def sample(device: Accelerator, work: Work, factor: float = 1.0) -> StepSample:
    seconds = Roofline(device, SHAPE).step_seconds(work)
    beside = device.step_seconds + device.sequence_seconds * work.sequences
    return StepSample(work, seconds * factor, (seconds - beside) * factor)


@pytest.mark.parametrize("overlap", [False, True])
def test_what_made_the_samples_is_found_again(overlap: bool) -> None:
    truth = replace(TRUTH, overlap=overlap)
    found = fit([sample(truth, work) for work in WORKS], Roofline(replace(CPU, overlap=overlap), SHAPE))
    for field in found.fitted:
        assert getattr(found.accelerator, field) == pytest.approx(getattr(truth, field), rel=1e-3)
    assert len(found.fitted) == 7
    assert max(found.median_error, found.p90_error, abs(found.total_error)) < 1e-3


def test_interrupted_steps_count_little() -> None:
    rng = np.random.default_rng(0)
    factors = np.where(rng.random(len(WORKS)) < 0.15, 2.5, rng.normal(1.0, 0.01, len(WORKS)))
    found = fit([sample(TRUTH, *pair) for pair in zip(WORKS, factors, strict=True)], Roofline(CPU, SHAPE))
    assert found.median_error < 0.05
    assert found.accelerator.compute_share == pytest.approx(TRUTH.compute_share, rel=0.1)
    assert found.accelerator.weights_share == pytest.approx(TRUTH.weights_share, rel=0.2)


def test_noise_does_not_make_the_model_fast() -> None:
    rng = np.random.default_rng(0)
    samples = [sample(TRUTH, work, factor) for work in WORKS for factor in rng.uniform(0.6, 1.4, 30)]
    found = fit(samples, Roofline(CPU, SHAPE))
    assert abs(found.total_error) < 0.03
    assert all(abs(each.total_error) < 0.05 for each in found.regimes)
    assert sum(each.steps for each in found.regimes) == len(samples)


def test_what_no_sample_shows_stays_as_it_was() -> None:
    works = [Work.of([(past, 1)] * rows, rows) for rows in (1, 2, 4, 8, 16, 32, 64) for past in (20, 400)]
    found = fit([sample(TRUTH, work) for work in works], Roofline(CPU, SHAPE))
    assert "attention_share" not in found.fitted
    assert found.accelerator.attention_share == CPU.attention_share
    assert found.accelerator.kv_share == pytest.approx(TRUTH.kv_share, rel=1e-3)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(KvarnError, match="too few"):
        fit([sample(TRUTH, work) for work in WORKS[:5]], Roofline(CPU, SHAPE))
