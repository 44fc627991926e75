"""Reserves: never more than there is to reserve, and none for nobody."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.serving.agents.reservations import Reservations, ReservationSettings

ROLES = st.sampled_from(["", "coder", "judge", "writer", "critic"])
USED = st.dictionaries(ROLES, st.integers(0, 200))
SCORES = st.dictionaries(ROLES, st.floats(-100, 100))


@given(st.lists(st.tuples(USED, SCORES), min_size=1, max_size=12), st.integers(1, 1000), st.floats(0, 1))
def test_the_reserve_is_bounded_and_shares_are_of_it(updates, blocks: int, critical: float) -> None:
    """Law: the ratio stays within bounds, shares sum to the reserve at most, and are of the best-scored roles."""
    settings = ReservationSettings(critical=critical)
    plan = Reservations(settings, blocks)
    for second, (used, scores) in enumerate(updates):
        plan.update(float(second), used, scores)
        assert settings.smallest <= plan.ratio <= settings.largest
        assert sum(plan.shares.values()) <= plan.ratio * blocks and min(plan.shares.values(), default=0) >= 0
        assert len(plan.shares) <= len(scores) and plan.shares.keys() <= scores.keys()
        others = [score for role, score in scores.items() if role not in plan.shares]
        assert all(scores[role] >= score for role in plan.shares for score in others)


@given(USED, SCORES, USED, USED, ROLES)
def test_only_who_waits_has_anything_withheld_for_him(used, scores, in_use, waiting, role) -> None:
    plan = Reservations(ReservationSettings(), 1000)
    plan.update(0.0, used, scores)
    withheld = plan.withheld(role, in_use, waiting)
    assert 0 <= withheld <= sum(share for other, share in plan.shares.items() if other != role)
    assert withheld <= sum(blocks for other, blocks in waiting.items() if other != role)
    assert plan.withheld(role, in_use, {}) == 0
    assert plan.withheld(role, plan.shares, waiting) == 0  # all have what was set aside


def test_a_plan_by_hand() -> None:
    """100 blocks, 80 used: the reserve is 5 of them, shared half by use and half by score."""
    plan = Reservations(ReservationSettings(), 100)
    plan.update(0.0, {"coder": 30, "judge": 10, "minor": 40}, {"coder": 3.0, "judge": 1.0, "minor": 0.0})
    assert (plan.ratio, plan.shares) == (0.05, {"coder": 3, "judge": 1})
    plan.update(0.5, {"coder": 80}, {"coder": 1.0})
    assert plan.ratio == 0.05  # not before a second has passed
    for second in range(1, 10):
        plan.update(float(second), {"coder": 30, "judge": 10, "minor": 40}, {"coder": 3.0, "judge": 1.0, "minor": 0.0})
    assert plan.ratio == pytest.approx(0.30) and plan.shares == {"coder": 22, "judge": 7}
    assert plan.withheld("minor", {"coder": 20}, {"coder": 50, "judge": 4}) == 2 + 4
    assert plan.withheld("coder", {}, {"coder": 50, "judge": 4}) == 4
    for second in range(10, 30):
        plan.update(float(second), {"coder": 10}, {"coder": 1.0})
    assert plan.ratio == 0.05


def test_published_shares_leave_a_part_of_the_reserve_to_nobody() -> None:
    used, scores = {"coder": 30, "judge": 10, "minor": 40}, {"coder": 3.0, "judge": 1.0, "minor": 0.0}
    sums = []
    for literal in (False, True):
        plan = Reservations(ReservationSettings(published=literal, smallest=0.3), 1000)
        plan.update(0.0, used, scores)
        sums.append(sum(plan.shares.values()))
    assert sums[0] >= 298 and sums[1] < 200
