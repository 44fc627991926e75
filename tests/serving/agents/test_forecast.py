"""Forecasts of tools: what is said before, during and after calls of every sort."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.serving.agents.forecast import Forecast, Forecaster, of_fraction, of_rest

RATIOS = st.lists(st.floats(0.01, 100), min_size=1, max_size=20).map(lambda ratios: tuple(sorted(ratios)))
SECONDS = st.floats(1e-3, 1e4)


def test_nothing_known_then_an_estimate_then_history_then_both() -> None:
    forecaster = Forecaster()
    unknown = forecaster.forecast("t", "coder", "tests")
    assert unknown.guessed and unknown.seconds > 0
    assert forecaster.forecast("t", "coder", "tests", 30.0).seconds == 30.0
    forecaster.learn("t", "coder", "tests", unknown, 10.0)
    assert forecaster.forecast("t", "coder", "tests").seconds == 10.0  # in place of the guess
    assert forecaster.forecast("t", "coder", "tests", 30.0).seconds == 20.0  # Eq. 1, half and half
    assert Forecaster(blend=1.0).forecast("t", "coder", "tests", 30.0).seconds == 30.0
    forecaster.learn("t", "coder", "tests", unknown, 20.0)
    assert forecaster.seconds("t", "coder", "tests") == 15.0


def test_a_role_that_is_new_is_told_by_others_of_its_tenant() -> None:
    forecaster = Forecaster()
    forecaster.learn("t", "coder", "tests", Forecast(1.0), 10.0)
    forecaster.learn("t", "judge", "tests", Forecast(1.0), 2.0)
    assert forecaster.forecast("t", "coder", "tests").seconds == 10.0
    assert forecaster.forecast("t", "judge", "tests").seconds == 2.0
    assert 2.0 < forecaster.forecast("t", "somebody", "tests").seconds < 10.0
    assert forecaster.seconds("another", "coder", "tests") is None
    assert forecaster.seconds("t", "coder", "web") is None


def test_a_guess_is_not_judged() -> None:
    forecaster = Forecaster()
    forecaster.learn("t", "", "tests", forecaster.forecast("t", "", "tests"), 500.0)
    assert max(forecaster.forecast("t", "", "tests").ratios) < 3.0


@given(RATIOS, SECONDS, st.floats(0, 1e6), st.floats(0, 1), st.floats(0, 1))
def test_what_is_left_grows_with_the_quantile_and_is_never_negative(ratios, seconds, elapsed, one, other) -> None:
    forecast = Forecast(seconds, ratios)
    low, high = sorted((one, other))
    assert 0.0 <= forecast.remaining(elapsed, low) <= forecast.remaining(elapsed, high) * (1 + 1e-9) + 1e-9


@given(RATIOS, SECONDS, st.floats(0, 1e5), st.floats(0, 1e5), st.floats(0, 1))
def test_the_longer_a_call_has_run_the_later_it_ends(ratios, seconds, one, other, quantile) -> None:
    """Law: to have lasted so long already never moves the end to an earlier time."""
    forecast = Forecast(seconds, ratios)
    early, late = sorted((one, other))
    assert late + forecast.remaining(late, quantile) >= (early + forecast.remaining(early, quantile)) * (1 - 1e-9)


def test_calls_that_ended_before_say_nothing_of_one_that_still_runs() -> None:
    forecast = Forecast(10.0, (0.5, 1.0, 3.0))
    assert forecast.remaining(0.0) == 10.0
    assert forecast.remaining(4.0) == 6.0
    assert forecast.remaining(5.0) == 15.0  # 10 or 30, as 5 is over: between them
    assert forecast.remaining(12.0, 0.0) == forecast.remaining(12.0, 1.0) == 18.0
    assert forecast.remaining(40.0) == 20.0  # nobody ever took so long


@pytest.mark.parametrize("bias", [0.1, 0.5, 3.0, 20.0])
def test_a_client_whose_estimates_are_always_wrong_is_corrected(bias: float) -> None:
    """Within eight calls of varying length the middle of what is said is within a third of the truth."""
    forecaster, rng = Forecaster(), random.Random(0)
    for _ in range(8):
        truth = 10.0 * rng.uniform(0.9, 1.1)
        forecast = forecaster.forecast("t", "a", "tests", bias * truth)
        forecaster.learn("t", "a", "tests", forecast, truth)
    said = forecaster.forecast("t", "a", "tests", bias * 10.0).remaining(0.0)
    assert said == pytest.approx(10.0, rel=0.34)


def test_heavy_tails_widen_what_is_said() -> None:
    steady, heavy = Forecaster(), Forecaster()
    rng = random.Random(0)
    for _ in range(40):
        for forecaster, took in ((steady, 10.0), (heavy, 10.0 * rng.paretovariate(1.2))):
            forecaster.learn("t", "", "tests", forecaster.forecast("t", "", "tests", 10.0), took)
    spread = []
    for forecaster in (steady, heavy):
        forecast = forecaster.forecast("t", "", "tests", 10.0)
        spread.append(forecast.remaining(0.0, 0.9) / forecast.remaining(0.0, 0.2))
    assert spread[0] < 1.1 and spread[1] > 2 * spread[0]


@given(st.floats(0, 1e4), st.floats(1e-3, 0.999))
def test_a_fraction_is_a_rate(elapsed: float, fraction: float) -> None:
    forecast = of_fraction(elapsed, fraction)
    left = max(1e-3, elapsed * (1 - fraction) / fraction)
    assert forecast.remaining(elapsed) == pytest.approx(left)
    assert 0 <= forecast.remaining(elapsed, 0.2) <= forecast.remaining(elapsed, 0.8)


@given(st.floats(0, 1e4), st.floats(0, 1e4), RATIOS)
def test_the_rest_is_as_sure_as_the_whole_was(rest: float, elapsed: float, ratios: tuple[float, ...]) -> None:
    before = Forecast(max(rest, 1e-3), ratios)
    forecast = of_rest(rest, elapsed, before)
    assert forecast.remaining(elapsed, 0.7) == pytest.approx(before.remaining(0.0, 0.7))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_whatever_calls_take_forecasts_stay_finite(durations: list[float]) -> None:
    forecaster = Forecaster()
    for seconds in durations:
        forecaster.learn("t", "", "x", forecaster.forecast("t", "", "x"), seconds)
    forecast = forecaster.forecast("t", "", "x")
    assert 0 < forecast.seconds <= max(1.0, *durations) * (1 + 1e-9)
    assert forecast.remaining(1e9) < float("inf") and forecaster.count == len(durations)
