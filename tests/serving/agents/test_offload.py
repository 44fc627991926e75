"""Rules of what becomes of KV while a tool runs, each where it says something."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.serving.agents.forecast import Forecast
from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.agents.lifecycle import Call
from kvarn.serving.agents.offload import (
    Discard,
    Finished,
    FixedTTL,
    Hardened,
    Load,
    MinimumWaste,
    PaysToKeep,
    Prospect,
    Published,
    Resident,
    StepsToExecution,
)

RULES = [
    Resident(), Finished(), Discard(), FixedTTL(5.0), PaysToKeep(), MinimumWaste(), StepsToExecution(), Published(),
    Hardened(),
]  # fmt: skip


def prospect(seconds: float = 10.0, *, out: float = 0.5, again: float = 4.0, host: bool = True, **fields) -> Prospect:
    call = Call("r", "", AgentHints(), "t", fields.pop("started", 0.0), Forecast(seconds, (1.0,)), 1e9)
    return Prospect(call, 10, fields.pop("tokens", 160), out, out, again, host)


def load(waiting=((4, 64),), tokens_per_second=100.0, batch=1000, queue=0.0) -> Load:
    return Load(waiting, tokens_per_second, batch, queue)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@given(
    st.floats(1e-3, 1e4), st.floats(0, 100), st.floats(0, 100), st.booleans(), st.floats(0, 1e5), st.booleans(),
    st.integers(0, 10_000),
)  # fmt: skip
def test_every_rule_always_answers(rule, seconds, out, again, host, now, finished, batch) -> None:
    """Law: and never sends to a host what it has no room for; what is about to be used is not moved by what keeps."""
    each = prospect(seconds, out=out, again=again, host=host)
    if finished:
        each.call.finished_at = now
    fate = rule.fate(each, load(batch=batch), now)
    assert fate in ("keep", "offload", "release", "discard")
    assert host or fate != "offload"
    if finished and not isinstance(rule, Finished):
        assert fate == "keep"
    place = rule.gives(each, now)
    assert place is None or isinstance(place, tuple)


def test_published_looks_once_and_wants_somebody_who_fits() -> None:
    assert Published().fate(prospect(), load(), 0.0) == "offload"
    assert Published().fate(prospect(), load(waiting=((4, 901),)), 0.0) == "keep"  # 9 s at 100 tokens/s
    assert Published().fate(prospect(), load(waiting=((4, 899),)), 0.0) == "offload"
    assert Published().fate(prospect(0.9), load(), 0.0) == "keep"  # shorter than the copies
    again = prospect()
    assert Published().fate(again, load(waiting=()), 0.0) == "keep"
    assert Published().fate(again, load(), 1.0) == "keep"


def test_hardened_gives_up_those_that_come_back_last_and_none_that_come_soon() -> None:
    rule = Hardened(margin=2.0)
    soon, late = prospect(1.9), prospect(30.0)
    assert rule.fate(late, load(), 0.0) == "keep"
    assert rule.gives(soon, 0.0) is None
    near, far = rule.gives(prospect(10.0), 0.0), rule.gives(late, 0.0)
    assert near is not None and far is not None and far < near
    assert rule.gives(late, 28.5) is None  # its end has come near
    assert rule.gives(prospect(7.0, host=False), 0.0) is None  # to be computed again takes 4 s
    assert rule.gives(prospect(9.0, host=False), 0.0) is not None
    assert rule.gives(prospect(0.04, out=0.0), 0.0) is None


def test_a_time_to_live() -> None:
    assert [FixedTTL(5.0).fate(prospect(), load(), now) for now in (0.0, 4.9, 5.0)] == ["keep", "keep", "release"]


def test_keeping_pays_for_short_calls_and_large_returns() -> None:
    rule = PaysToKeep()
    assert rule.fate(prospect(1.0), load(batch=0, queue=0.0), 0.5) == "keep"  # 4 s to compute, for 1 s of holding
    assert rule.fate(prospect(100.0), load(batch=0, queue=0.0), 0.5) == "release"
    assert rule.fate(prospect(100.0), load(batch=0, queue=200.0), 0.5) == "keep"
    assert rule.fate(prospect(1.0), load(batch=0), 1.5) == "release"  # it was to have ended


def test_least_waste_by_hand() -> None:
    """160 tokens beside 1000: to compute wastes 4640 (token seconds), a round trip 1160, keeping 160 a second."""
    rule = MinimumWaste()
    assert rule.fate(prospect(7.0), load(), 0.0) == "keep"
    assert rule.fate(prospect(7.5), load(), 0.0) == "offload"
    assert rule.fate(prospect(28.0, host=False), load(), 0.0) == "keep"
    assert rule.fate(prospect(30.0, host=False), load(), 0.0) == "discard"


def test_steps_to_execution_ignores_the_clock() -> None:
    rule = StepsToExecution()
    done, old, new = prospect(started=0.0), prospect(started=1.0), prospect(started=2.0)
    done.call.finished_at = 3.0
    order = sorted((done, new, old), key=lambda each: rule.gives(each, 5.0) or ())
    assert order == [old, new, done]
