"""The agentic policy on a virtual clock: with people, with agents, and with both."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.serving.agent_calls import AgentCalls
from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.policies.agentic.policy import Agentic
from kvarn.serving.policies.agentic.settings import AgenticSettings
from kvarn.serving.policies.streaming.policy import Streaming
from kvarn.serving.policies.streaming.settings import StreamingSettings

from .paged_text import continuation, make_engine, make_request
from .virtual_serving import REQUESTS, arriving, prompt, serve


def engine_of(policy, **fields):
    engine = make_engine(policy=policy, step=0.05, **fields)
    if isinstance(policy, Agentic):
        engine.agents = AgentCalls(engine.cache, engine.tiers)
    if engine.tiers is not None:
        engine.tiers.copier.job_seconds = 1e-3
    return engine


def agentic(**fields):
    return Agentic(AgenticSettings(prefill_budget=8, **fields))


@settings(max_examples=12, deadline=None)
@given(REQUESTS, st.integers(20, 60), st.sampled_from([0, 40]), st.integers(0, 5))
def test_without_agents_every_token_comes_when_the_streaming_policy_has_it_come(requests, blocks, slots, seed):
    seen = []
    for policy in (Streaming(StreamingSettings(prefill_budget=8)), agentic()):
        engine = engine_of(policy, num_blocks=blocks, host_slots=slots)
        seen.append(serve(engine, arriving(requests), random.Random(seed)))
    assert seen[0] == seen[1]


def run_until(engine, done, most=5000):
    for _ in range(most):
        if done():
            return
        engine.step()
        while engine.tiers is not None and engine.tiers.copier.queue:
            engine.tiers.copier.complete()
        engine.clock.advance(0.01)
    raise AssertionError("it does not come about")


def test_readers_with_text_before_them_make_room_for_an_agent_and_do_not_run_dry():
    engine = engine_of(agentic(), num_blocks=40, host_slots=100, token_budget=64)
    readers = [make_request(f"reader {i}", prompt(20, i), 60, stream_rate=2.0) for i in range(2)]
    for request in readers:
        engine.add(request)
    run_until(engine, lambda: all(r.reader.slack(engine.clock.now()) > 8.0 for r in readers))
    agent = make_request("agent", prompt(60, 5), 8, arrival=engine.clock.now(), agent=AgentHints(agent="a"))
    engine.add(agent)
    began = engine.clock.now()
    run_until(engine, lambda: agent.finish_reason is not None)
    assert engine.clock.now() - began < 5.0
    assert engine.counters.preemptions > 0, "nobody made room"
    run_until(engine, lambda: not engine.has_work)
    for request in readers:
        assert request.tokens[20:80].tolist() == continuation(prompt(20, int(request.id[-1])), 60)
        assert request.reader.stalls == 0


def test_a_critical_request_takes_the_place_of_minor_ones():
    engine = engine_of(agentic(residence=0.5), num_blocks=30, host_slots=60, token_budget=64)
    minor = [
        make_request(f"m{i}", prompt(24, i), 30, agent=AgentHints(f"minor {i}", "minor"), priority=1) for i in range(3)
    ]
    for request in minor:
        engine.add(request)
    run_until(engine, lambda: all(request.num_outputs > 3 for request in minor[:2]))
    engine.clock.advance(1.0)
    now = engine.clock.now()
    hints = AgentHints("p", "main", critical=True)
    critical = make_request("c", prompt(60, 7), 4, arrival=now, agent=hints, priority=-5)
    engine.add(critical)
    run_until(engine, lambda: critical.finish_reason is not None)
    assert any(request.finish_reason is None for request in minor)
    run_until(engine, lambda: not engine.has_work)


@pytest.mark.parametrize("reserve", ["on", "off"])
def test_a_head_that_finds_no_blocks_is_not_overtaken(reserve):
    """Small ones come all the time; the large one runs as soon as those before it have ended."""
    engine = engine_of(agentic(reserve=reserve, preempt=False), num_blocks=30, token_budget=64)
    hints = AgentHints(agent="a")
    for i in range(3):
        engine.add(make_request(f"first {i}", prompt(20, i), 20, agent=hints))
    run_until(engine, lambda: len(engine.running) == 3)
    large = make_request("large", prompt(90, 5), 4, arrival=engine.clock.now(), agent=hints, priority=-30)
    engine.add(large)
    small = []

    def begun():
        small.append(
            make_request(f"s{len(small)}", prompt(8, len(small) % 5), 4, arrival=engine.clock.now(), agent=hints)
        )
        engine.add(small[-1])
        return large.num_blocks > 0

    run_until(engine, begun, most=200)
    assert len(small) > 5 and not any(request.num_outputs for request in small)
    run_until(engine, lambda: not engine.has_work)
