"""Orders of requests: who goes first, that nobody starves, and what the published formula does instead."""

from __future__ import annotations

from math import e

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.agents.priority import ORDERS, Claim, published, ranked, response_ratio
from kvarn.serving.agents.programs import Program

PRIORITIES = st.integers(-(2**31), 2**31 - 1)
CLAIMS = st.builds(
    Claim, arrival=st.floats(0, 100), began=st.floats(0, 100), tokens=st.integers(1, 10_000),
    seconds=st.floats(0, 1000), priority=PRIORITIES, importance=st.floats(-9, 9),
    hints=st.just(AgentHints()), program=st.none(),
)  # fmt: skip


def claim(arrival: float = 0.0, seconds: float = 10.0, program: Program | None = None, **fields: object) -> Claim:
    return Claim(arrival, arrival, 100, seconds, program=program, **fields)  # type: ignore[arg-type]


def program(began: float, remaining: float = -1.0, service: float = 0.0) -> Program:
    return Program("p", "t", began, began, service, remaining)


@given(CLAIMS, st.floats(0, 1e4), PRIORITIES)
def test_nobody_starves(waiting: Claim, seconds: float, priority: int) -> None:
    """Law: who waits is some day before every newcomer, also one of a program that always was and is nearly over."""
    now = 1e9
    newcomer = Claim(now, now, 10, seconds, priority=priority)
    of_old = Claim(now, now, 10, seconds, program=program(-1e9, 0.0), priority=priority, importance=9.0)
    assert response_ratio(waiting, now) < response_ratio(newcomer, now)
    assert response_ratio(waiting, now) < response_ratio(of_old, now)


@given(st.floats(0, 1e4), PRIORITIES)
def test_a_priority_is_worth_at_most_five_minutes(seconds: float, priority: int) -> None:
    now = 1000.0
    favoured = response_ratio(claim(now, seconds, priority=priority), now)
    assert favoured >= response_ratio(claim(now - 300.0, seconds), now)
    assert favoured <= response_ratio(claim(now + 300.0, seconds), now)
    assert response_ratio(claim(priority=-1), 5.0) < response_ratio(claim(), 5.0)


def test_the_ratio_by_hand() -> None:
    """Of 10 s after 5 s: 1.5; of 2 s after 3 s: 2.5; of a program of 20 s that began 30 s ago: 2.5, and it is older."""
    long, short = claim(0.0, 10.0), claim(2.0, 2.0)
    assert response_ratio(long, 5.0)[0] == -1.5
    assert response_ratio(short, 5.0)[0] == -2.5
    of_program = claim(4.0, 1.0, program(-25.0, 20.0))
    assert response_ratio(of_program, 5.0)[0] == -2.5
    keys = ranked(["long", "short", "of program"], [long, short, of_program], response_ratio, 5.0)
    assert sorted(keys, key=keys.__getitem__) == ["of program", "short", "long"]


def test_within_a_program_the_longest_way_goes_first() -> None:
    one = program(0.0, 40.0)
    near, far = (claim(3.0, 5.0, one, hints=AgentHints(remaining_seconds=left)) for left in (10.0, 40.0))
    assert response_ratio(far, 10.0) < response_ratio(near, 10.0)


@given(CLAIMS, CLAIMS, CLAIMS, st.sampled_from(sorted(ORDERS)))
def test_those_that_are_waited_for_together_go_as_one(one: Claim, two: Claim, three: Claim, order: str) -> None:
    a, b = program(0.0), program(1.0)
    join = AgentHints(join="j")
    claims = [
        Claim(each.arrival, each.began, each.tokens, each.seconds, join, owner, each.priority, each.importance)
        for each, owner in ((one, a), (two, a), (three, b))
    ]
    keys = ranked(["1", "2", "3"], claims, ORDERS[order], 200.0)
    own = [ORDERS[order](each, 200.0) for each in claims]
    assert keys["1"] == keys["2"] == min(own[0], own[1]) and keys["3"] == own[2]


@given(CLAIMS, st.floats(100, 200))
def test_importance_above_the_mean_helps_and_below_hurts(plain: Claim, now: float) -> None:
    def of(importance: float) -> float:
        return response_ratio(Claim(plain.arrival, plain.began, 10, plain.seconds, importance=importance), now)[0]

    assert of(3.0) <= of(0.0) <= of(-3.0)


def test_other_orders_by_hand() -> None:
    old, new = program(0.0, service=100_000.0), program(50.0, service=10.0)
    late_of_old, early_of_new = claim(90.0, program=old), claim(60.0, program=new)
    first = {name: order(late_of_old, 100.0) < order(early_of_new, 100.0) for name, order in ORDERS.items()}
    assert first["program"] and not first["service"] and not first["request"] and not first["conversation"]
    for name in ("program", "service", "request", "conversation", "published"):
        urgent = ORDERS[name](claim(99.0, priority=-1), 100.0)
        assert urgent < ORDERS[name](claim(0.0), 100.0)


def test_the_published_formula_gives_nothing_for_sinks_and_punishes_waiting() -> None:
    """Eq. 3 is 0 where nothing comes after; Eq. 4 falls once the wait exceeds tokens / e."""
    deep = [claim(0.0, hints=AgentHints(depth=9, fan_out=out)) for out in (0, 1)]
    assert published(deep[0], 10.0) == published(claim(0.0), 10.0)
    assert published(deep[1], 10.0) < published(deep[0], 10.0)
    values = [-published(claim(0.0), wait)[1] for wait in (10.0, 100 / e, 60.0, 100.0, 200.0)]
    assert values[0] < values[1] > values[2] > values[3] > values[4] and values[3] == pytest.approx(0.0)
