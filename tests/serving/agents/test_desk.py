"""Calls and programs as they come and go: deadlines, tombstones, retention, who goes on from what, and bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.errors import RequestError
from kvarn.serving.agents import desk as desk_module
from kvarn.serving.agents.events import CallFinish, CallProgress, CallStart, Close
from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.agents.lifecycle import CallState

from .turns import DeskWithTurns, Turn


@given(st.floats(0, 1e9))
def test_a_call_is_given_up_after_four_forecasts_within_bounds(seconds: float) -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r"))
    report, _, _ = desk.handle(CallStart("r", seconds=seconds), 10.0)
    given = min(3600.0, max(60.0, 4 * seconds))
    assert report.deadline_seconds == pytest.approx(given)
    assert not desk.expire(10.0 + given - 0.5) and "r" in desk.calls
    (over,) = desk.expire(10.0 + given + 0.5)
    assert over.id == "r" and over.state is CallState.DEAD and not desk.calls
    assert desk.counters.expired == 1
    report, _, _ = desk.handle(CallFinish("r"), 11.0 + given)  # late: remembered for a minute
    assert report.state == "dead"
    desk.expire(10.0 + given + 61.0)
    with pytest.raises(RequestError) as caught:
        desk.handle(CallFinish("r"), 12.0 + given)
    assert caught.value.status == 404


def test_a_call_may_begin_within_a_minute_after_its_answer() -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r"))
    desk.end(Turn("s"))
    desk.expire(59.0)
    desk.handle(CallStart("r"), 59.0)
    desk.expire(61.0)
    with pytest.raises(RequestError) as caught:
        desk.handle(CallStart("s"), 61.0)
    assert caught.value.status == 404 and "'s'" in str(caught.value)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(1, 1000))
def test_progress_never_shortens_a_deadline_and_judges_the_first_forecast(fractions: list[float], took: float) -> None:
    """Law: what is learnt is how long the call took over what was said at its start, whatever was said in between."""
    desk = DeskWithTurns()
    desk.end(Turn("r"))
    before, _, _ = desk.handle(CallStart("r", tool="t", seconds=10.0), 0.0)
    deadline = before.deadline_seconds
    for i, fraction in enumerate(sorted(fractions), start=1):
        now = took * i / (len(fractions) + 1)
        report, _, _ = desk.handle(CallProgress("r", fraction=fraction), now)
        assert report.remaining_seconds >= 0 and report.expected_seconds == 10.0
        assert now + report.deadline_seconds >= deadline - 1e-6
        deadline = now + report.deadline_seconds
    desk.handle(CallFinish("r"), took)
    assert desk.forecaster.error_seconds == pytest.approx(abs(took - 10.0))
    assert took / 10.0 in desk.forecaster.forecast("", "", "t").ratios


def test_a_fraction_tells_what_is_left() -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r"))
    desk.handle(CallStart("r", seconds=2.0), 0.0)
    report, _, _ = desk.handle(CallProgress("r", fraction=0.25), 30.0)
    assert report.remaining_seconds == pytest.approx(90.0)
    assert desk.calls["r"].remaining(60.0) == pytest.approx(60.0, rel=0.2)


def test_stages_are_learnt_and_tell_what_is_left() -> None:
    desk = DeskWithTurns()
    stages = ("find", "read", "sum up")
    for i in range(3):
        id, start = f"r{i}", 100.0 * i
        desk.end(Turn(id), start)
        report, _, _ = desk.handle(CallStart(id, tool="t", stages=stages), start)
        if i:
            assert report.expected_seconds == pytest.approx(17.0)
        reading, _, _ = desk.handle(CallProgress(id, stage="read"), start + 2.0)
        if i:
            assert reading.remaining_seconds == pytest.approx(15.0)
        desk.handle(CallProgress(id, stage="read"), start + 3.0)  # told before
        desk.handle(CallProgress(id, stage="sum up"), start + 12.0)
        desk.handle(CallProgress(id, stage="find"), start + 13.0)  # late
        desk.handle(CallFinish(id), start + 17.0)
    assert [desk.forecaster.seconds("", "", f"t/{stage}") for stage in stages] == pytest.approx([2.0, 10.0, 5.0])


def test_a_stage_that_was_passed_over_is_not_learnt_from() -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r"))
    desk.handle(CallStart("r", tool="t", stages=("a", "b", "c")), 0.0)
    report, _, _ = desk.handle(CallProgress("r", stage="c"), 8.0)
    assert report.remaining_seconds == pytest.approx(4.0)  # as if all were equally long
    desk.handle(CallFinish("r"), 9.0)
    assert [desk.forecaster.seconds("", "", f"t/{stage}") for stage in "abc"] == [None, None, 1.0]


def test_a_conversation_is_kept_for_as_long_as_its_client_wants() -> None:
    desk = DeskWithTurns()
    kept = desk.end(Turn("r", retain_seconds=20.0))
    long = desk.end(Turn("s", retain_seconds=1e9))
    assert kept is not None and (kept.retained, kept.deadline) == (True, 20.0)
    assert long is not None and long.deadline == 3600.0
    assert desk.end(Turn("t", retain_seconds=0.0)) is None
    assert desk.expire(21.0) == [kept]
    counters = desk.counters
    assert (counters.started, counters.finished, counters.expired) == (0, 0, 0)  # no tool was called


def test_a_retained_conversation_becomes_a_call_when_its_client_says_so() -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r", retain_seconds=20.0))
    report, begun, _ = desk.handle(CallStart("r", tool="t", seconds=100.0), 5.0)
    assert begun is None and report.deadline_seconds == 395.0
    assert not desk.calls["r"].retained and desk.counters.started == 1
    desk.handle(CallFinish("r"), 6.0)
    assert (desk.counters.finished, desk.forecaster.count) == (1, 1)


def test_a_request_that_goes_on_ends_the_call_when_it_runs() -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r"))
    desk.handle(CallStart("r"), 0.0)
    first, second = Turn("s", continues="r"), Turn("t", continues="r")
    desk.note_added(first, 7.0)
    assert desk.calls["r"].finished and desk.call_of("s") is desk.calls["r"]
    assert desk.counters.found[CallState.KEPT] == 1
    assert not desk.expire(1000.0)  # not while somebody waits to go on from it
    desk.note_ended(first, 8.0, goes_on=False)  # cancelled before it ran
    desk.note_added(second, 9.0)
    assert desk.call_of("t") is desk.calls["r"]
    call = desk.taken_over(second, 10.0)
    assert call is not None and call.state is CallState.DEAD and not desk.calls
    assert desk.counters.continued == 1 and desk.taken_over(second, 11.0) is None


def test_another_tenant_cannot_go_on_from_a_call() -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r", tenant="a", agent=AgentHints(program="p")))
    desk.handle(CallStart("r", "a"), 0.0)
    thief = Turn("s", tenant="b", continues="r")
    desk.note_added(thief, 1.0)
    assert not desk.calls["r"].finished and desk.call_of("s") is None and desk.programs.of("s") is None
    assert desk.taken_over(thief, 2.0) is None


def test_closing_a_program_closes_calls_of_requests_that_only_go_on_in_it() -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r", agent=AgentHints(program="p")))
    desk.end(Turn("s", continues="r"))  # says nothing itself
    desk.handle(CallStart("s"), 0.0)
    desk.end(Turn("other", tenant="b", agent=AgentHints(program="p")))
    desk.handle(CallStart("other", "b"), 0.0)
    assert desk.handle(Close(program="p"), 1.0)[0].closed == 1
    assert list(desk.calls) == ["other"]


def test_a_program_without_a_name_is_closed_by_its_first_request() -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r"))
    desk.handle(CallStart("r"), 0.0)
    assert [program.id for program in desk.programs] == ["r"]
    assert desk.handle(Close(program="r"), 1.0)[0].closed == 1


def test_the_calls_of_one_tenant_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast they come: the oldest are let go at the next look."""
    monkeypatch.setattr(desk_module, "_TENANT_CALLS", 5)
    monkeypatch.setattr(desk_module, "_MOST_CALLS", 8)
    desk = DeskWithTurns()
    for i in range(40):
        desk.end(Turn(f"a{i}", tenant="a"), 1.0)
        desk.handle(CallStart(f"a{i}", "a", seconds=1000.0), 1.0)
    desk.expire(2.0)
    assert list(desk.calls) == [f"a{i}" for i in range(35, 40)]
    for i in range(40):
        desk.end(Turn(f"b{i}", tenant="b"), 3.0)
        desk.handle(CallStart(f"b{i}", "b", seconds=1000.0), 3.0)
    desk.expire(4.0)
    assert [call.tenant for call in desk.calls.values()] == ["b"] * 5


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from("aeg"), st.sampled_from(["", "p", "q"])), max_size=60))
def test_programs_know_what_is_live(moves: list[tuple[int, str, str]]) -> None:
    """Law: requests that came and have not ended, and no others, are live, in whatever order they come and go."""
    desk = DeskWithTurns()
    there: dict[int, Turn] = {}
    for now, (number, what, program) in enumerate(moves):
        if number in there:
            desk.note_ended(there.pop(number), now, goes_on=what == "g")
        else:
            hints = AgentHints(program=program) if program else None
            turn = there[number] = Turn(f"{number} {now}", agent=hints, continues=f"{number - 1} {now - 1}")
            desk.note_added(turn, now)
    of_programs = {turn.id for turn in there.values() if desk.programs.of(turn.id) is not None}
    assert desk.programs.num_live == len(of_programs)
    assert {id for program in desk.programs for id in program.live} == of_programs
