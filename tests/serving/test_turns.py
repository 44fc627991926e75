"""Every policy by name behind the real engine; what sets the baselines apart; what copying by other rules changes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.serving.kvcache.copies import CopyRules
from kvarn.serving.policies.ranked import Ranked, RoundRobin, least_slack
from kvarn.serving.policies.registry import POLICIES
from kvarn.serving.policies.reserving import Reserving

from .paged_text import continuation, make_engine, make_request
from .virtual_serving import REQUESTS, arriving, prompt, serve

RULES = [CopyRules(), CopyRules("in order"), CopyRules("off"), CopyRules(overlap=False)]


def _expected(coming):
    return {r.id: continuation(r.tokens[: r.prompt_length].tolist(), r.params.max_tokens) for r in coming}


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25, deadline=None)
@given(REQUESTS, st.integers(20, 60), st.integers(0, 60), st.floats(0, 0.4), st.sampled_from(RULES), st.integers(0))
def test_every_text_is_right_and_ends_under_every_policy(name, requests, num_blocks, slots, failing, rules, seed):
    """Law: whatever the policy, the tier and its rules, each text is what it should be."""
    engine = make_engine(num_blocks=num_blocks, policy=POLICIES[name](8), host_slots=slots, step=0.05)
    if engine.tiers is not None:
        engine.tiers.rules = rules
    coming = arriving(requests)
    expected = _expected(coming)
    texts, _ = serve(engine, coming, random.Random(seed), failing=failing)
    assert texts == expected


_UNUSUAL = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 2), st.integers(1, 12), st.floats(0, 4), st.sampled_from([0.1, 20, 1e4])),
    min_size=1,
    max_size=8,
)
"""As REQUESTS, but prompts are shares of the pool, and readers are of all sorts."""


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=25, deadline=None)
@given(
    _UNUSUAL, st.integers(4, 12), st.sampled_from([1, 4, 5]), st.integers(1, 8), st.integers(1, 4), st.integers(0, 6),
    st.integers(0),
)  # fmt: skip
def test_who_fills_the_pool_is_served_as_well(
    name, requests, num_blocks, block_size, token_budget, max_running, slots, seed
):
    """Law: in engines of any size, whoever is let in gets his text, also with a prompt that takes every block."""
    engine = make_engine(
        num_blocks=num_blocks, block_size=block_size, token_budget=token_budget, max_running=max_running,
        policy=POLICIES[name](4), host_slots=slots, step=0.05,
    )  # fmt: skip
    room = num_blocks * block_size
    coming = []
    for i, (share, family, count, at, rate) in enumerate(requests):
        count = min(count, room - 1)
        length = 1 + round(share * (room - count - 1))
        coming.append(
            make_request(f"r{i}", prompt(length, family), count, arrival=at, stream_rate=rate, priority=family - 1)
        )
    expected = _expected(coming)
    texts, _ = serve(engine, coming, random.Random(seed))
    assert texts == expected


@settings(max_examples=50, deadline=None)
@given(REQUESTS, st.integers(20, 60), st.sampled_from([None, 0.5]))
def test_who_has_reserved_everything_is_never_taken_off(requests, num_blocks, ahead):
    engine = make_engine(num_blocks=num_blocks, policy=Reserving(ahead=ahead), step=0.05)
    serve(engine, arriving(requests), random.Random(0))
    assert engine.counters.preemptions == 0


def test_pacing_keeps_readers_just_ahead():
    engine = make_engine(num_blocks=100, policy=Reserving(ahead=1.0), step=0.01, token_budget=64)
    coming = [make_request(f"r{i}", prompt(10, i), 60, stream_rate=10.0) for i in range(4)]
    ahead = 0.0
    for request in coming:
        engine.add(request)
    while engine.has_work:
        now = engine.clock.now()
        engine.step()
        if engine.clock.now() == now:
            engine.clock.advance(max(1e-3, min(0.05, engine.wake_at - now)))
        ahead = max(ahead, *(request.reader.slack(engine.clock.now()) for request in coming))
    assert 0.9 < ahead < 1.3
    assert sum(request.reader.stalls for request in coming) == 0


@pytest.mark.parametrize("ranking", [RoundRobin(quantum=0.5), least_slack])
def test_those_who_take_turns_all_begin_before_one_has_ended(ranking):
    """12 texts, room for about 4."""
    policy = Ranked(ranking, tick=0.25)
    engine = make_engine(num_blocks=80, policy=policy, host_slots=1000, step=0.05, max_running=12, token_budget=64)
    coming = [make_request(f"r{i}", prompt(20, i), 60, stream_rate=4.0) for i in range(12)]
    expected = _expected(coming)
    texts, times = serve(engine, coming, random.Random(0), copying=0.9)
    assert texts == expected
    assert max(of_one[0] for of_one in times.values()) < min(of_one[-1] for of_one in times.values())
