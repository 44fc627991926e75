"""Laws of tool durations: the middle, the spread and the tail that each promises."""

from __future__ import annotations

import numpy as np
import pytest

from kvarn.simulation.agents.tools import LAWS, TOOLS, parse_law, published_gaps
from kvarn.simulation.workloads import WorkloadError


def draws(law: str, kind: str = "search", count: int = 20_000) -> np.ndarray:
    rng, drawn = np.random.default_rng(7), parse_law(law)
    return np.array([drawn.draw(kind, rng) for _ in range(count)])


def test_poisson_durations_are_whole_seconds_whose_variance_is_their_mean() -> None:
    values = draws("poisson:4")
    assert np.array_equal(values, np.rint(values))
    assert values.mean() == pytest.approx(4, rel=0.03)
    assert values.var() == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("law", ["lognormal:2", "lognormal:2:1.5", "pareto:2", "pareto:2:0.8"])
def test_the_middle_of_a_skewed_law_is_its_median(law: str) -> None:
    assert np.median(draws(law)) == pytest.approx(2, rel=0.05)


def test_the_tail_of_a_pareto_law_falls_as_its_power() -> None:
    values = draws("pareto:2:1.2")
    assert np.mean(values > 20) / np.mean(values > 2) == pytest.approx(10**-1.2, rel=0.15)


def test_a_fixed_law_has_one_value_and_a_kinds_own_where_none_is_said() -> None:
    assert set(draws("fixed:5", count=9)) == {5.0}
    assert set(draws("fixed", "web_search", 9)) == {TOOLS["web_search"].typical}
    assert set(draws("fixed:0", count=9)) == {0.0}
    assert parse_law("lognormal").typical("a tool of ours") == 1.0


def test_recorded_gaps_have_the_published_shape() -> None:
    gaps = np.array(published_gaps())
    assert np.mean(gaps <= 1) == pytest.approx(0.8646, abs=1e-3)
    assert np.mean(gaps <= 10) == pytest.approx(0.9512, abs=1e-3)
    assert np.mean(gaps > 60) == pytest.approx(0.04, abs=1e-3)
    assert gaps[gaps > 60].sum() / gaps.sum() == pytest.approx(0.85, abs=0.01)
    assert np.median(gaps) == pytest.approx(0.7, rel=0.01)
    assert draws("recorded:0.5").max() <= gaps.max() / 2


@pytest.mark.parametrize("law", LAWS)
def test_durations_follow_from_the_seed_and_are_never_negative(law: str) -> None:
    values = draws(law, count=500)
    assert np.array_equal(values, draws(law, count=500))
    assert (values >= 0).all()


@pytest.mark.parametrize("text", ["", "uniform", "lognormal:x", "fixed:-1", "pareto:2:0.0001:3", "poisson:nan"])
def test_a_law_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(WorkloadError):
        parse_law(text)
