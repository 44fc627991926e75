"""Latency, throughput and reading quality against figures worked out by hand and the metric's closed form."""

from __future__ import annotations

import json
import math
from io import StringIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvarn.simulation.report import Distribution, RequestRecord, Slo, playback, render, summarize, token_weights

gaps = st.lists(st.floats(0.0, 5.0), min_size=1, max_size=60)


def closed_form(generation_rate: float, reader_rate: float) -> float:
    """Effective share of a long uninterrupted stream (research note, section 3)."""
    rho = 1 - reader_rate / generation_rate
    if rho <= 0.1:
        return 1.0
    if rho >= 0.2:
        return 0.15 / rho
    full = 0.1 / rho
    return full + (1 - full) * (1 + 1 - (rho - 0.1) / 0.1) / 2


@pytest.mark.parametrize(
    ("generation_rate", "share"),
    [(22, 1.00), (23.5, 0.92), (25, 0.75), (30, 0.45), (40, 0.30), (60, 0.225), (100, 0.187)],
)
def test_effective_share_of_a_steady_stream_is_the_closed_form(generation_rate: float, share: float) -> None:
    """A reader of 20 tokens/s; the published table and the formula."""
    length = 4000
    effective = playback(np.arange(length) / generation_rate, 20.0).effective_tokens / length
    assert effective == pytest.approx(closed_form(generation_rate, 20.0), abs=0.005)
    assert effective == pytest.approx(share, abs=0.006)


def test_playback_by_hand_with_one_stall() -> None:
    """Reader of 1 token/s, tokens at 0, 0.5, 3, 3: read at 0, 1, 3, 4; the third is 1 s late."""
    played = playback([0.0, 0.5, 3.0, 3.0], 1.0)
    assert played.rebuffer_seconds == pytest.approx(1.0)
    assert played.stalls == 1
    assert played.unread.tolist() == [0, 1, 0, 1]
    assert played.effective_tokens == pytest.approx(2.0)  # 1 of 4 unread is above 20 %


def test_tokens_exactly_on_the_readers_beat_neither_stall_nor_pile_up() -> None:
    played = playback(np.arange(1000) / 30.0 + 17.3, 30.0)
    assert played.stalls == 0
    assert played.unread.max() == 0
    assert played.effective_tokens == 1000


def test_token_weight_falls_linearly_between_a_tenth_and_a_fifth() -> None:
    weights = token_weights(np.array([0, 10, 12, 15, 20, 50]), 100)
    assert weights == pytest.approx([1.0, 1.0, 0.8, 0.5, 0.0, 0.0])


@given(gaps, st.floats(0.1, 100.0))
def test_playback_follows_its_recurrence(steps: list[float], rate: float) -> None:
    """play_j = max(t_j, play_(j-1) + 1/r); waiting = what it had to be pushed; B_j = made less read."""
    times = np.cumsum(steps)
    play, waited = [times[0]], 0.0
    for time in times[1:]:
        wanted = play[-1] + 1 / rate
        waited += max(0.0, time - wanted)
        play.append(max(time, wanted))
    unread = [j + 1 - sum(p <= t + 1e-6 for p in play[: j + 1]) for j, t in enumerate(times)]
    played = playback(times, rate)
    assert played.rebuffer_seconds == pytest.approx(waited, abs=1e-6)
    assert np.abs(played.unread - unread).max() <= 1  # a token may sit on the tolerance's edge
    assert 0 <= played.effective_tokens <= len(times)


@given(gaps, st.floats(1.0, 50.0), st.floats(1.0, 50.0))
def test_a_slower_reader_never_waits_longer(steps: list[float], one: float, other: float) -> None:
    times = np.cumsum(steps)
    slow, fast = sorted((one, other))
    assert playback(times, slow).rebuffer_seconds <= playback(times, fast).rebuffer_seconds + 1e-6


def two_requests() -> list[RequestRecord]:
    return [
        RequestRecord(arrival=10.0, prompt_tokens=100, token_times=(11.0, 11.5, 12.0)),
        RequestRecord(arrival=12.0, prompt_tokens=50, token_times=(15.0, 20.0)),
        RequestRecord(arrival=9.0, prompt_tokens=70, token_times=(30.0,), error="disconnected"),
    ]


def test_latency_and_throughput_by_hand() -> None:
    report = summarize(two_requests())
    assert (report.requests, report.completed, report.failures) == (3, 2, {"disconnected": 1})
    assert report.makespan == pytest.approx(11.0)  # from the failed request's arrival to the last good token
    assert report.ttft.mean == pytest.approx(2.0)
    assert report.ttft.p50 == pytest.approx(2.0)
    assert report.tpot.mean == pytest.approx((0.5 + 5.0) / 2)
    assert (report.itl.count, report.itl.max) == (3, 5.0)
    assert report.e2el.max == pytest.approx(8.0)
    assert report.output_throughput == pytest.approx(5 / 11)
    assert report.total_throughput == pytest.approx(155 / 11)
    assert report.rebuffer.count == 0  # nobody said how fast anyone reads


def test_goodput_counts_requests_that_keep_every_slo() -> None:
    records = two_requests()
    assert summarize(records, slo=Slo(ttft=1.0)).good_share == pytest.approx(1 / 3)
    assert summarize(records, slo=Slo(ttft=5.0, tpot=0.5)).goodput == pytest.approx(1 / 11)
    assert summarize(records, slo=Slo(ttft=5.0, tpot=5.0, e2el=8.0)).goodput == pytest.approx(2 / 11)
    assert summarize(records, slo=Slo(tpot=0.1)).goodput == 0


def test_effective_throughput_is_over_the_makespan_and_uses_each_readers_own_rate() -> None:
    burst = tuple([1.0] * 10)  # all at once: only the first two are within a fifth, the second weighs 1 at 10 %
    own = RequestRecord(0.0, 5, burst, stream_rate=1.0)
    report = summarize([own], stream_rate=1e9)
    assert report.effective_throughput == pytest.approx(2.0)
    assert summarize([RequestRecord(0.0, 5, burst)], stream_rate=1.0).effective_share == pytest.approx(0.2)


def test_one_token_requests_have_no_tpot() -> None:
    report = summarize([RequestRecord(0.0, 5, (1.0,))], slo=Slo(tpot=0.001))
    assert report.tpot.count == 0
    assert report.good_share == 1.0


def test_a_run_without_answers_is_a_report_of_failures() -> None:
    report = summarize([RequestRecord(0.0, 5, error="HTTP 429"), RequestRecord(0.0, 5)], stream_rate=20.0)
    assert report.failures == {"HTTP 429": 1, "no tokens": 1}
    assert report.makespan == report.output_throughput == report.goodput == 0
    assert summarize([]).requests == 0


def test_report_is_plain_json_and_renders() -> None:
    report = summarize(two_requests(), slo=Slo(ttft=1.0), stream_rate=20.0)
    parsed = json.loads(json.dumps(report.to_json()))
    assert parsed["ttft"]["p99"] == report.ttft.p99
    console = Console(file=StringIO(), width=120)
    console.print(render(report, title="run"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "TTFT" in text
    assert "failed: disconnected" in text
    assert "33% keep the SLOs" in text


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_percentiles_are_ordered_and_inside_the_sample(values: list[float]) -> None:
    sample = Distribution.of(values)
    assert min(values) <= sample.p50 <= sample.p90 <= sample.p99 <= sample.max == max(values)
    assert math.isclose(sample.mean, sum(values) / len(values), rel_tol=1e-9, abs_tol=1e-9)
