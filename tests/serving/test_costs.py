"""Estimates against the machine that the facts came from."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.serving.costs import Costs


@given(st.floats(1e-3, 2e-2), st.floats(1e-5, 2e-3), st.floats(1e-9, 1e-6), st.integers(0))
def test_a_machine_of_that_shape_is_found(c0, c1, c2, seed):
    rng, costs = random.Random(seed), Costs()
    for _ in range(200):
        rows = rng.randint(1, 64)
        context = rows * rng.randint(50, 2000)
        costs.note_step(rows, context, 0, (c0 + c1 * rows + c2 * context) * rng.uniform(0.98, 1.02))
    for rows, context in ((1, 500), (16, 8000), (64, 64_000)):
        assert costs.decode_seconds(rows, context) == pytest.approx(c0 + c1 * rows + c2 * context, rel=0.3)


def test_prefill_is_what_a_mixed_step_takes_beyond_its_decoding():
    costs = Costs()
    for _ in range(100):
        costs.note_step(8, 800, 0, 0.010)
    for _ in range(40):
        costs.note_step(8, 800, 200, 0.110)
    assert costs.prefill_seconds(100) == pytest.approx(0.05, rel=0.1)


def test_without_facts_estimates_are_finite_and_grow():
    costs = Costs()
    assert 0 < costs.decode_seconds(1, 0) < costs.decode_seconds(64, 10_000) < 1
    assert costs.prefill_seconds(0) == 0 < costs.prefill_seconds(10)


def test_the_level_is_followed_at_once_and_other_batches_are_not_forgotten():
    """A machine that becomes half as fast, while all batches are of one size."""

    def seconds(rows: int) -> float:
        return 0.010 + 0.0005 * rows

    costs = Costs()
    for rows in (*range(1, 33), *range(1, 33)):
        costs.note_step(rows, 300 * rows, 0, seconds(rows))
    for _ in range(60):
        costs.note_step(32, 9600, 0, 2 * seconds(32))
    assert costs.decode_seconds(32, 9600) == pytest.approx(2 * seconds(32), rel=0.1)
    assert costs.decode_seconds(8, 2400) == pytest.approx(2 * seconds(8), rel=0.35)


def test_one_step_that_was_held_up_says_little():
    costs = Costs()
    for _ in range(50):
        costs.note_step(8, 800, 0, 0.010)
    costs.note_step(8, 800, 0, 5.0)
    assert costs.decode_seconds(8, 800) < 0.014
