"""Workloads as people write them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from kvarn.simulation.scenarios import synthetic, with_clients
from kvarn.simulation.workloads import Diurnal, Fixed, LogNormal, RequestSpec, WorkloadError


def test_a_burst_says_how_many() -> None:
    specs = synthetic("burst:60", prompt=Fixed(5))
    assert [spec.arrival for spec in specs] == [0.0] * 60
    assert {spec.prompt_tokens for spec in specs} == {5}
    assert 1.0 < synthetic("burst:60,within=2")[-1].arrival <= 2.0


@pytest.mark.parametrize("text", ["poisson:4", "gamma:4,cv=2", "burstgpt:4,period=100,swing=0.5"])
def test_processes_have_their_rate(text: str) -> None:
    specs = synthetic(text, requests=4000, seed=1)
    assert len(specs) == 4000
    assert 4000 / specs[-1].arrival == pytest.approx(4.0, rel=0.15)
    assert specs == synthetic(text, requests=4000, seed=1)
    assert specs != synthetic(text, requests=4000, seed=2)


def test_days_are_busier_than_nights() -> None:
    times = Diurnal(10.0, cv=1.0, period=100.0, swing=0.8).times(20_000, np.random.default_rng(0))
    assert (np.diff(times) >= 0).all()
    share_by_day = (times % 100 < 50).mean()
    assert share_by_day == pytest.approx(0.5 + 0.8 / np.pi, abs=0.03)


def test_steady_days_are_gamma() -> None:
    gaps = np.diff(Diurnal(5.0, cv=3.0, swing=0.0).times(50_000, np.random.default_rng(0)))
    assert gaps.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(3.0, rel=0.05)


def test_lognormal_lengths_have_a_long_tail_inside_their_bounds() -> None:
    draws = LogNormal(200, 1.0, low=10, high=3000).draw(20_000, np.random.default_rng(0))
    assert 10 <= draws.min() <= draws.max() <= 3000
    assert np.median(draws) == pytest.approx(200, rel=0.05)
    assert draws.mean() > 1.3 * np.median(draws)


def test_readers_and_departures_are_shares_of_the_requests() -> None:
    specs = with_clients([RequestSpec(0.0, 5, 6)] * 2000, "0.4:15,0.6:20", "0.25:5")
    rates = Counter(spec.stream_rate for spec in specs)
    assert rates[15.0] / 2000 == pytest.approx(0.4, abs=0.04)
    assert rates[15.0] + rates[20.0] == 2000
    patience = [spec.leaves_after for spec in specs if spec.leaves_after is not None]
    assert len(patience) / 2000 == pytest.approx(0.25, abs=0.04)
    assert np.mean(patience) == pytest.approx(5.0, rel=0.2)
    assert with_clients(specs, stream_rate=30.0) == with_clients(specs) == specs
    assert {spec.stream_rate for spec in with_clients([RequestSpec(0.0, 5, 6)], stream_rate=30.0)} == {30.0}
    assert {spec.stream_rate for spec in with_clients(specs, "12")} == {12.0}


@pytest.mark.parametrize(
    "text",
    ["flood:3", "burst", "burst:x", "burst:nan", "burst:0", "poisson:-1", "poisson:1,cv=2", "gamma:1,cv=x",
     "burstgpt:1,swing=1"],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_words(text: str) -> None:
    with pytest.raises(WorkloadError, match=r"expected|has"):
        synthetic(text)


@pytest.mark.parametrize(("readers", "departures"), [("x", ""), ("0:5", ""), ("-5", ""), ("", "0.5"), ("", "2:5")])
def test_impossible_clients_are_refused_in_words(readers: str, departures: str) -> None:
    with pytest.raises(WorkloadError, match="expected"):
        with_clients([RequestSpec(0.0, 1, 1)], readers, departures)
