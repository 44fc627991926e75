"""Returns: all blocks are there when the upload is due, as far as there are free ones; never more than allowed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvarn.serving.agents.upload import Return, ReturnStep, next_step


@given(
    st.integers(1, 200), st.floats(0, 20), st.floats(0, 2), st.floats(0.005, 0.2), st.integers(1, 50),
    st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(0, 200), st.booleans(),
)  # fmt: skip
def test_the_schedule(blocks, early, copy_seconds, step_seconds, lead, free, allowance, gradual) -> None:
    """Law: never more than is free or allowed; where both suffice at each step, the upload begins as soon as it is due
    and has all its blocks by then; an upload never begins before."""
    due, reserved, steps = early - 1.25 * copy_seconds - 0.1, 0, 0
    ample = min(free) >= blocks and allowance >= blocks
    while steps < 5000:
        back = Return(blocks, reserved, max(0.0, early - steps * step_seconds), copy_seconds)
        room = max(0, min(free[steps % len(free)], allowance - reserved))
        step = next_step(
            back, step_seconds=step_seconds, lead=lead, free=free[steps % len(free)], allowance=allowance - reserved,
            gradual=gradual,
        )  # fmt: skip
        late = back.early - 1.25 * copy_seconds - 0.1 <= 0
        assert 0 <= step.reserve <= room and not (step.reserve and step.upload)
        assert gradual or step.reserve == 0
        if step.upload:
            assert late and blocks - reserved <= room
            return
        assert not (late and ample), "due, and there is room"
        assert reserved + step.reserve <= min(blocks, allowance)
        if step.reserve:
            assert late or back.early - 1.25 * copy_seconds - 0.1 <= lead * step_seconds
        reserved += step.reserve
        steps += 1
        if steps * step_seconds > due + 40 * len(free) * step_seconds + 1:
            break
    assert not ample


def test_blocks_are_taken_in_equal_shares_of_the_steps_left() -> None:
    """Due in 0.5 s, steps of 0.1 s, lead of 5: 10 blocks at 2 a step."""
    reserved, taken = 0, []
    for i in range(5):
        back = Return(10, reserved, 0.6 + 0.01 - 0.1 * i, 0.0)
        step = next_step(back, step_seconds=0.1, lead=6, free=100, allowance=100)
        taken.append(step.reserve)
        reserved += step.reserve
    assert taken == [2, 2, 2, 2, 2]
    assert next_step(Return(10, 10, 0.05, 0.0), step_seconds=0.1, lead=6, free=0, allowance=0) == ReturnStep(
        upload=True
    )


def test_a_tool_that_has_answered_is_returned_at_once() -> None:
    assert next_step(Return(10, 0, 0.0, 5.0), step_seconds=0.1, lead=8, free=10, allowance=10).upload
    short = next_step(Return(10, 0, 0.0, 5.0), step_seconds=0.1, lead=8, free=4, allowance=10)
    assert short == ReturnStep(reserve=4)
    assert next_step(Return(10, 4, 0.0, 5.0), step_seconds=0.1, lead=8, free=6, allowance=6).upload
    assert next_step(Return(10, 0, 0.0, 5.0), step_seconds=0.1, lead=8, free=4, allowance=10, gradual=False) == (
        ReturnStep()
    )
