"""The table of calls, and every event in every state: what is done, what is refused, what is forgotten when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.errors import IllegalTransition, RequestError
from kvarn.serving.agents.events import AgentEvent, CallFinish, CallProgress, CallReport, CallStart, Close
from kvarn.serving.agents.forecast import Forecast
from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.agents.lifecycle import LEGAL, Call, CallState

from .turns import TOLD, DeskWithTurns, Turn

S = CallState
WAYS: dict[CallState, list[CallState]] = {
    S.KEPT: [],
    S.OFFLOADING: [S.OFFLOADING],
    S.OFFLOADED: [S.OFFLOADING, S.OFFLOADED],
    S.RESERVING: [S.OFFLOADING, S.OFFLOADED, S.RESERVING],
    S.UPLOADING: [S.OFFLOADING, S.OFFLOADED, S.RESERVING, S.UPLOADING],
    S.READY: [S.OFFLOADING, S.OFFLOADED, S.UPLOADING, S.READY],
    S.RELEASED: [S.RELEASED],
}
"""How each state but the last is reached."""
OVER = {S.RELEASED, S.DEAD}


@pytest.mark.parametrize("before", S)
@pytest.mark.parametrize("after", S)
def test_only_moves_of_the_table_are_made(before: CallState, after: CallState) -> None:
    call = Call("r", "", AgentHints(), "", 0.0, Forecast(1.0), 60.0, state=before)
    if after in LEGAL[before]:
        call.move_to(after, 3.0)
        assert (call.state, call.moved_at) == (after, 3.0)
    else:
        with pytest.raises(IllegalTransition, match=f"request r: {before.value} -> {after.value}"):
            call.move_to(after, 3.0)
        assert call.state is before and call.moved_at == float("-inf")


def test_the_table_in_words() -> None:
    """Whatever is held can be let go and can end; nothing comes back from the dead; KV that left comes in order."""
    assert set(LEGAL) == set(S)
    for state in S:
        if state is not S.DEAD:
            assert S.DEAD in LEGAL[state]
        if state not in OVER:
            assert S.RELEASED in LEGAL[state]
    assert LEGAL[S.DEAD] == set() and LEGAL[S.RELEASED] == {S.DEAD}
    assert [state for state in S if S.UPLOADING in LEGAL[state]] == [S.OFFLOADED, S.RESERVING]


@pytest.mark.parametrize("state", WAYS)
def test_the_tool_may_answer_wherever_the_kv_is(state: CallState) -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r"))
    desk.handle(CallStart("r", tool="tests", seconds=8.0), 0.0)
    call = desk.calls["r"]
    for step in WAYS[state]:
        call.move_to(step, 1.0)
    report, begun, over = desk.handle(CallFinish("r"), 6.0)
    assert (report.state, report.remaining_seconds, begun, over) == (state.value, 0.0, None, [])
    assert call.finished and call.remaining(100.0) == 0.0
    assert report.deadline_seconds == 30.0  # for a request that does not come
    again, _, _ = desk.handle(CallFinish("r"), 9.0)
    assert (again.state, again.deadline_seconds) == (state.value, 27.0)
    assert (desk.counters.finished, desk.forecaster.count) == (1, 1)


@pytest.mark.parametrize("state", WAYS)
@pytest.mark.parametrize("event", [Close("r"), Close(program="p")])
def test_a_close_ends_a_call_wherever_its_kv_is_and_may_come_twice(state: CallState, event: Close) -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r", agent=AgentHints(program="p")))
    desk.handle(CallStart("r"), 0.0)
    call = desk.calls["r"]
    for step in WAYS[state]:
        call.move_to(step, 1.0)
    report, _, over = desk.handle(event, 2.0)
    assert (report.state, report.closed, over) == ("dead", 1, [call])
    assert call.state is S.DEAD and not desk.calls
    report, _, over = desk.handle(event, 3.0)
    assert (report.state, report.closed, over) == ("dead", 0, [])


def test_what_has_begun_may_be_said_again_and_another_tool_is_refused() -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r"))
    first, begun, _ = desk.handle(CallStart("r", tool="tests", seconds=20.0), 0.0)
    assert begun is not None and begun[0].id == "r" and begun[1].id == "r"
    for now in (1.0, 2.0):
        again, begun, over = desk.handle(CallStart("r", tool="tests", seconds=99.0), now)
        assert begun is None and not over
        assert again.expected_seconds == first.expected_seconds
    assert desk.counters.started == 1
    assert refused(desk, CallStart("r", tool="web"), 3.0) == (409, "tool")
    desk.handle(CallFinish("r"), 4.0)
    late, begun, _ = desk.handle(CallStart("r", tool="tests"), 5.0)
    assert begun is None and late.remaining_seconds == 0.0  # the first one, late


def test_a_client_adds_to_what_the_server_has_concluded() -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r"))
    desk.handle(CallStart("r", tool="get_weather,get_time", implicit=True), 0.0)
    report, _, _ = desk.handle(CallStart("r", tool="weather", seconds=50.0, stages=("ask", "read")), 2.0)
    assert (desk.calls["r"].tool, desk.calls["r"].explicit) == ("weather", True)
    assert (report.expected_seconds, report.deadline_seconds) == (50.0, 198.0)
    desk.handle(CallStart("r", tool="get_weather,get_time", implicit=True), 3.0)
    assert desk.calls["r"].tool == "weather"
    desk.end(Turn("s"), 10.0)
    desk.handle(CallStart("s", implicit=True), 10.0)
    desk.handle(CallFinish("s"), 11.0)
    assert refused(desk, CallStart("s", tool="weather"), 12.0) == (409, "request")


def test_a_call_that_is_announced_begins_when_its_request_ends() -> None:
    desk = DeskWithTurns()
    turn = Turn("r")
    desk.note_added(turn, 0.0)
    report, begun, _ = desk.handle(CallStart("r", tool="tests", seconds=20.0), 1.0)
    assert (report.state, begun) == ("announced", None)
    assert refused(desk, CallStart("r", tool="web"), 1.0) == (409, "tool")
    assert refused(desk, CallFinish("r"), 2.0) == (409, "request")
    call = desk.note_ended(turn, 5.0, goes_on=True)
    assert call is not None and (call.started, call.tool, call.deadline) == (5.0, "tests", 85.0)
    gone = Turn("s")
    desk.note_added(gone, 0.0)
    desk.handle(CallStart("s"), 1.0)
    assert desk.note_ended(gone, 5.0, goes_on=False) is None  # it failed: there is nothing to go on with
    assert refused(desk, CallFinish("s"), 6.0) == (404, "request")


def test_what_is_closed_while_it_is_announced_does_not_begin() -> None:
    desk = DeskWithTurns()
    turn = Turn("r")
    desk.note_added(turn, 0.0)
    desk.handle(CallStart("r"), 1.0)
    assert desk.handle(Close("r"), 2.0)[0].state == "dead"
    assert desk.note_ended(turn, 5.0, goes_on=True) is None and not desk.calls


@pytest.mark.parametrize("event", TOLD)
def test_what_is_unknown_or_of_another_tenant_looks_the_same(event: AgentEvent) -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r", tenant="a", agent=AgentHints(program="p")))
    if not isinstance(event, CallStart):
        desk.handle(CallStart("r", "a"), 0.0)
    elsewhere = DeskWithTurns()
    answers = []
    for place in (desk, elsewhere):
        with pytest.raises(RequestError) as caught:
            place.handle(event, 1.0)
        assert (caught.value.status, caught.value.code) == (404, "not_found")
        answers.append(str(caught.value))
    assert answers[0] == answers[1]
    assert len(desk.calls) == (not isinstance(event, CallStart))


def test_a_running_request_of_another_tenant_is_unknown_too() -> None:
    desk = DeskWithTurns()
    desk.note_added(Turn("r", tenant="a"), 0.0)
    for event in TOLD:
        if not (isinstance(event, Close) and event.program):
            assert refused(desk, event, 1.0)[0] == 404


def test_what_makes_no_sense_is_named() -> None:
    desk = DeskWithTurns()
    desk.end(Turn("r"))
    assert refused(desk, CallFinish("r"), 0.0) == (409, "request")  # no call has begun
    assert refused(desk, CallProgress("r", fraction=0.5), 0.0) == (409, "request")
    desk.handle(CallStart("r", stages=("find", "read")), 0.0)
    assert refused(desk, CallProgress("r"), 1.0) == (400, "fraction")
    assert refused(desk, CallProgress("r", fraction=1.5), 1.0) == (400, "fraction")
    assert refused(desk, CallProgress("r", fraction=float("nan")), 1.0) == (400, "fraction")
    assert refused(desk, CallProgress("r", stage="bake"), 1.0) == (400, "stage")
    assert refused(desk, Close(), 1.0) == (400, "request")
    desk.handle(CallFinish("r"), 2.0)
    assert refused(desk, CallProgress("r", fraction=0.5), 3.0) == (409, "request")
    desk.handle(Close("r"), 4.0)
    assert refused(desk, CallProgress("r", fraction=0.5), 5.0) == (409, "request")
    assert desk.handle(CallFinish("r"), 5.0)[0].state == "dead"


@given(st.lists(st.sampled_from([*TOLD, *(type(event)("r") for event in TOLD[:4])]), max_size=12))
def test_no_order_of_events_breaks_anything(events: list[AgentEvent]) -> None:
    """Law: each is answered or refused with a status and a field; what is over is buried."""
    desk = DeskWithTurns()
    desk.end(Turn("r", agent=AgentHints(program="p")))
    for now, event in enumerate(events):
        try:
            report, _, over = desk.handle(event, float(now))
        except RequestError as error:
            assert error.status in (400, 404, 409) and error.field
        else:
            assert isinstance(report, CallReport) and report.request == (event.request or "p")
            assert all(call.state is S.DEAD and call.id not in desk.calls for call in over)
    desk.expire(1e6)
    assert not desk.calls


def refused(desk: DeskWithTurns, event: AgentEvent, now: float) -> tuple[int, str | None]:
    """Status and field of the error."""
    with pytest.raises(RequestError) as caught:
        desk.handle(event, now)
    return caught.value.status, caught.value.field
