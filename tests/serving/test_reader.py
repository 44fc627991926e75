"""The reader's playback clock: the recurrence it stands for, and the report's own computation of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.serving.reader import Reader
from kvarn.simulation.report import playback

gaps = st.lists(st.floats(0, 2), min_size=1, max_size=60)
rates = st.floats(0.5, 60)


def times_of(gaps: list[float]) -> list[float]:
    times, now = [], 0.0
    for gap in gaps:
        now += gap
        times.append(now)
    return times


@given(gaps, rates)
def test_stalls_and_buffer_are_those_of_the_report(gaps: list[float], rate: float) -> None:
    times = times_of(gaps)
    reader, unread = Reader(rate), []
    for now in times:
        reader.receive(now)
        unread.append(reader.buffer(now))
    told = playback(times, rate)
    assert reader.stall_seconds == pytest.approx(told.rebuffer_seconds, abs=1e-3)
    assert all(abs(mine - theirs) <= 1 for mine, theirs in zip(unread, told.unread.tolist(), strict=True))


@given(gaps, rates, st.floats(0, 5))
def test_buffer_and_slack_follow_the_recurrence(gaps: list[float], rate: float, later: float) -> None:
    times = times_of(gaps)
    reader, plays = Reader(rate), []
    for now in times:
        reader.receive(now)
        plays.append(max(now, plays[-1] + 1 / rate) if plays else now)
    now = times[-1] + later
    assert reader.slack(now) == pytest.approx(max(0.0, plays[-1] + 1 / rate - now), abs=1e-6)
    sure, possible = (sum(play > now + margin for play in plays) for margin in (1e-4, -1e-4))
    assert sure <= reader.buffer(now) <= possible


def test_before_the_first_token_there_is_nothing_to_read() -> None:
    reader = Reader(20)
    assert not reader.started and reader.slack(100.0) == 0 and reader.buffer(100.0) == 0


def test_a_late_token_shifts_all_that_follow() -> None:
    reader = Reader(10)
    reader.receive(0.0)
    reader.receive(1.0)  # was wanted at 0.1
    assert (reader.stalls, reader.stall_seconds) == (1, pytest.approx(0.9))
    assert reader.slack(1.0) == pytest.approx(0.1)


def test_another_rate_keeps_what_is_unread() -> None:
    reader = Reader(10)
    for _ in range(11):
        reader.receive(0.0)
    reader.set_rate(20, 0.5)
    assert reader.buffer(0.5) == 5 or reader.buffer(0.5) == 6
    assert reader.slack(0.5) == pytest.approx(0.3)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan")])
def test_a_rate_that_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        Reader(rate)


def test_words_of_how_far_he_is_tell_what_is_left_and_how_fast_he_reads():
    reader = Reader(20)
    for _ in range(100):
        reader.receive(0.0)
    reader.acknowledge(0, 0.0, fastest=50)
    reader.acknowledge(10, 1.0, fastest=50)
    assert reader.rate == pytest.approx(15) and reader.buffer(1.0) == pytest.approx(90, abs=1)
    for second in range(2, 9):
        reader.acknowledge(10 * second, float(second), fastest=50)
    assert reader.rate == pytest.approx(10, rel=0.02)
    assert reader.slack(8.0) == pytest.approx(2.0, rel=0.05)


@pytest.mark.parametrize(("read", "at"), [(101, 5.0), (-1, 5.0), (4, 5.0)])
def test_words_that_cannot_be_are_ignored(read, at):
    reader = Reader(20)
    for _ in range(100):
        reader.receive(0.0)
    reader.acknowledge(5, 0.0, fastest=50)
    before = (reader.rate, reader.slack(at))
    reader.acknowledge(read, at, fastest=50)
    assert (reader.rate, reader.slack(at)) == before


def test_he_is_believed_only_so_far():
    reader = Reader(20)
    for _ in range(1000):
        reader.receive(0.0)
    for second in range(10):
        reader.acknowledge(100 * second, float(second), fastest=30)
    assert reader.rate == 30
