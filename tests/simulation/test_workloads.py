"""Synthetic workloads: seeded, sized as asked, and refused when they cannot exist."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.simulation.workloads import (
    Burst,
    Fixed,
    Gamma,
    Poisson,
    RequestSpec,
    TruncatedNormal,
    WorkloadError,
    replay,
    synthesize,
    with_arrivals,
)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("arrivals", [Burst(), Burst(3.0), Poisson(5.0), Gamma(5.0, 2.0)])
def test_arrivals_ascend_from_the_start_and_repeat_with_their_seed(arrivals: Burst | Poisson | Gamma) -> None:
    times = arrivals.times(200, rng())
    assert times.shape == (200,)
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert (times == arrivals.times(200, rng())).all()


def test_burst_is_spread_over_its_window_only() -> None:
    assert Burst().times(10, rng()).tolist() == [0.0] * 10
    assert 1.5 < Burst(2.0).times(1000, rng()).max() <= 2.0


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_gaps_have_the_rate_and_variation_asked_for(cv: float) -> None:
    gaps = np.diff(Gamma(4.0, cv).times(50_000, rng()))
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_poisson_is_gamma_with_variation_one() -> None:
    assert (Poisson(3.0).times(50, rng()) == Gamma(3.0, 1.0).times(50, rng())).all()


@given(st.floats(1, 500), st.floats(0.1, 1000), st.integers(0, 2**31))
def test_truncated_normal_stays_inside_however_narrow(mean: float, deviation: float, seed: int) -> None:
    low, high = max(1, int(mean) - 3), int(mean) + 3
    draws = TruncatedNormal(mean, deviation, low, high).draw(50, np.random.default_rng(seed))
    assert low <= draws.min() <= draws.max() <= high


def test_truncated_normal_cuts_rather_than_clips() -> None:
    draws = TruncatedNormal(100, 50, low=50, high=150).draw(20_000, rng())
    assert draws.mean() == pytest.approx(100, abs=1)
    assert (draws == 50).mean() < 0.02  # clipping would put 16 % there


def test_changing_one_part_of_a_workload_leaves_the_others() -> None:
    base = synthesize(50, Poisson(2.0), TruncatedNormal(100, 30), Fixed(10), seed=3)
    other = synthesize(50, Poisson(2.0), TruncatedNormal(100, 30), TruncatedNormal(50, 9), seed=3)
    assert [(one.arrival, one.prompt_tokens) for one in base] == [(one.arrival, one.prompt_tokens) for one in other]
    assert base != synthesize(50, Poisson(2.0), TruncatedNormal(100, 30), Fixed(10), seed=4)


def test_replay_shifts_speeds_cuts_and_fills_in_readers() -> None:
    trace = [RequestSpec(30.0, 900, 90), RequestSpec(10.0, 100, 10, stream_rate=5.0), RequestSpec(50.0, 1, 1)]
    specs = replay(trace, limit=2, speed=2.0, max_prompt_tokens=500, max_output_tokens=50, stream_rate=20.0)
    assert specs == [RequestSpec(0.0, 100, 10, 5.0), RequestSpec(10.0, 500, 50, 20.0)]


def test_with_arrivals_keeps_the_requests_in_order() -> None:
    specs = with_arrivals([RequestSpec(0.0, 5, 6), RequestSpec(0.0, 7, 8)], Poisson(1.0), seed=1)
    assert [one.prompt_tokens for one in specs] == [5, 7]
    assert 0.0 == specs[0].arrival < specs[1].arrival


@pytest.mark.parametrize(
    "make",
    [
        lambda: RequestSpec(-1.0, 1, 1),
        lambda: RequestSpec(float("nan"), 1, 1),
        lambda: RequestSpec(0.0, 0, 1),
        lambda: RequestSpec(0.0, 1, 0),
        lambda: RequestSpec(0.0, 1, 1, stream_rate=0.0),
        lambda: Burst(-1.0),
        lambda: Poisson(0.0),
        lambda: Poisson(float("nan")),
        lambda: Gamma(1.0, 0.0),
        lambda: Fixed(0),
        lambda: TruncatedNormal(5, 0),
        lambda: TruncatedNormal(5, 1, low=6),
        lambda: TruncatedNormal(5, 1, low=0),
        lambda: synthesize(0, Burst(), Fixed(1), Fixed(1)),
        lambda: replay([RequestSpec(0.0, 1, 1)], speed=0.0),
        lambda: replay([RequestSpec(0.0, 1, 1)], limit=0),
        lambda: replay([]),
    ],
)
def test_impossible_workloads_are_refused_in_words(make: object) -> None:
    with pytest.raises(WorkloadError, match=r"expected|holds no usable"):
        make()  # type: ignore[operator]
