"""The step loop over an executor that notices any wrong block."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.errors import RequestError
from kvarn.serving.batch import Batch, SampledToken
from kvarn.serving.policies.fcfs import FirstComeFirstServed
from kvarn.serving.policies.protocol import Decision, Snapshot
from kvarn.serving.request import FinishReason

from .paged_text import EOS, continuation, make_engine, make_request, next_token, run

PROMPTS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 2), st.integers(1, 12), st.integers(-1, 1)), min_size=1, max_size=12
)


def _prompt(length: int, family: int) -> list[int]:
    """Prompts of one family are prefixes of each other, so they share blocks."""
    return [(family * 101 + i * 7) % 900 for i in range(length)]


@settings(max_examples=60, deadline=None)
@given(PROMPTS, st.integers(14, 40), st.integers(1, 24), st.integers(1, 6), st.booleans(), st.randoms())
def test_text_is_right_whatever_the_schedule(prompts, num_blocks, budget, max_running, share, rng):
    """Law: pool size, budget, sharing, preemption and arrival order never change what a request generates."""
    engine = make_engine(num_blocks=num_blocks, token_budget=budget, max_running=max_running, share=share)
    waiting = [
        make_request(f"r{i}", _prompt(length, family), count, priority=priority)
        for i, (length, family, count, priority) in enumerate(prompts)
    ]
    expected = {r.id: continuation(r.tokens[: r.prompt_length].tolist(), r.params.max_tokens) for r in waiting}
    rng.shuffle(waiting)
    texts: dict[str, list[int]] = {}
    for _ in range(5000):
        if waiting and rng.random() < 0.5:
            request = waiting.pop()
            request.arrival = engine.clock.now()
            engine.add(request)
        if not waiting and not engine.has_work:
            break
        engine.clock.advance(1.0)
        for emission in engine.step():
            texts.setdefault(emission.request.id, []).append(emission.token)
    assert texts == expected
    assert engine.cache.pool.num_active == 0
    assert engine.executor.alive == set()


def test_who_gave_way_goes_on_before_those_who_came_with_him_and_have_not_begun():
    engine = make_engine(num_blocks=12, max_running=2)
    for i in range(6):
        engine.add(make_request(f"r{i}", list(range(1 + i, 17 + i)), 16))
    first: list[str] = []
    while engine.has_work:
        first += [emission.request.id for emission in engine.step() if emission.finish_reason is not None]
    assert engine.counters.preemptions > 0
    assert first == [f"r{i}" for i in range(6)]


def test_small_pool_preempts_and_still_finishes_everyone():
    engine = make_engine(num_blocks=12, token_budget=64)
    for i in range(6):
        engine.add(make_request(f"r{i}", [i, i + 1, i + 2], 20, arrival=float(i)))
    texts = run(engine)
    assert engine.counters.preemptions > 0
    assert texts == {f"r{i}": continuation([i, i + 1, i + 2], 20) for i in range(6)}


def test_cached_prefix_is_not_computed_again():
    engine = make_engine(token_budget=100)
    prompt = _prompt(33, 0)
    engine.add(make_request("first", prompt, 3))
    run(engine)
    before = engine.executor.computed_tokens
    second = make_request("second", prompt, 3)
    engine.add(second)
    assert run(engine)["second"] == continuation(prompt, 3)
    assert second.cached_tokens == 32
    assert engine.executor.computed_tokens - before == 1 + 2


def test_equal_prompts_that_arrive_together_are_computed_once():
    engine = make_engine(token_budget=100)
    prompt = _prompt(33, 0)
    for i in range(4):
        engine.add(make_request(f"r{i}", prompt, 3))
    assert run(engine) == {f"r{i}": continuation(prompt, 3) for i in range(4)}
    assert engine.executor.computed_tokens == 33 + 3 * 1 + 4 * 2


def test_tenants_do_not_share_prefixes():
    engine = make_engine(token_budget=100)
    prompt = _prompt(33, 0)
    engine.add(make_request("first", prompt, 1, tenant="a"))
    run(engine)
    other = make_request("second", prompt, 1, tenant="b")
    engine.add(other)
    run(engine)
    assert other.cached_tokens == 0


def test_long_prompt_is_prefilled_in_chunks_while_others_decode():
    engine = make_engine(num_blocks=100, token_budget=8)
    engine.add(make_request("reader", [1, 2, 3], 30))
    engine.step()
    engine.add(make_request("long", _prompt(80, 1), 2, arrival=1.0))
    reader_tokens = 0
    while engine.waiting or any(r.id == "long" and r.num_uncomputed > 1 for r in engine.running):
        emissions = engine.step()
        assert engine.executor.computed_tokens <= 3 + 8 * engine.counters.steps
        reader_tokens += sum(e.request.id == "reader" for e in emissions)
    assert reader_tokens >= 11, "the reader gets a token in every step of the long prefill"


def test_lower_priority_number_runs_first():
    engine = make_engine(max_running=1)
    engine.add(make_request("late", [1], 2, priority=5))
    engine.add(make_request("early", [2], 2, priority=-5, arrival=9.0))
    order = []
    while engine.has_work:
        order += [e.request.id for e in engine.step()]
    assert order == ["early", "early", "late", "late"]


def test_cancel_frees_blocks_in_any_state():
    rng = random.Random(7)
    engine = make_engine(num_blocks=30, token_budget=8)
    ids = []
    for i in range(200):
        engine.add(make_request(f"r{i}", _prompt(rng.randint(1, 30), i % 3), rng.randint(1, 10), arrival=float(i)))
        ids.append(f"r{i}")
        for _ in range(rng.randint(0, 2)):
            engine.step()
        engine.cancel(rng.choice(ids))
    for id in ids:
        engine.cancel(id)
    engine.step()
    engine.check()
    assert not engine.has_work
    assert engine.cache.pool.num_active == 0
    assert engine.executor.alive == set()


def test_deadline_ends_a_waiting_and_a_running_request():
    engine = make_engine(max_running=1)
    engine.add(make_request("running", [1], 100, deadline=5.0))
    engine.add(make_request("waiting", [2], 100, arrival=1.0, deadline=4.0))
    reasons = {}
    while engine.has_work:
        engine.clock.advance(1.0)
        reasons |= {e.request.id: e.finish_reason for e in engine.step() if e.finish_reason}
    assert reasons == {"running": FinishReason.DEADLINE, "waiting": FinishReason.DEADLINE}
    assert engine.clock.now() == 5.0


def test_failing_forward_ends_its_requests_and_nothing_else():
    engine = make_engine(max_running=1)
    engine.add(make_request("unlucky", [1], 5))
    engine.add(make_request("next", [2], 5, arrival=1.0))
    engine.executor.fail_next = True
    (emission,) = engine.step()
    assert emission.finish_reason is FinishReason.ERROR and "boom" in emission.error
    assert run(engine) == {"next": continuation([2], 5)}


def test_stop_token_ends_unless_min_tokens():
    first = next_token([5])
    engine = make_engine()
    stopping = make_request("stop", [5], 4)
    stopping.stop_tokens = frozenset({first})
    patient = make_request("patient", [5], 4)
    patient.stop_tokens = frozenset({EOS})
    engine.add(stopping)
    engine.add(patient)
    texts = run(engine)
    assert texts == {"stop": [first], "patient": continuation([5], 4)}
    assert stopping.finish_reason is FinishReason.STOP and patient.finish_reason is FinishReason.LENGTH


def test_a_grammar_complete_with_the_last_token_is_a_stop_and_no_cut(monkeypatch: pytest.MonkeyPatch):
    engine = make_engine()
    sample = engine.executor.execute

    def complete(batch: Batch) -> list[list[SampledToken]]:
        return [[SampledToken(sampled.token, grammar_done=True)] for (sampled,) in sample(batch)]

    monkeypatch.setattr(engine.executor, "execute", complete)
    request = make_request("json", [1], 1)
    engine.add(request)
    run(engine)
    assert request.finish_reason is FinishReason.STOP


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "field"),
    [([], 1, "prompt"), (list(range(200)), 100, "max_tokens"), ([1] * 300, 1, "prompt"), ([1000], 1, "prompt")],
)
def test_impossible_requests_are_refused_and_leave_nothing(prompt, max_tokens, field):
    engine = make_engine()
    with pytest.raises(RequestError) as caught:
        engine.add(make_request("bad", prompt, max_tokens))
    assert caught.value.field == field
    assert not engine.has_work and engine.executor.alive == set()


class _Sleepy:
    """Grants nothing before its hour."""

    def __init__(self, hour: float) -> None:
        self.hour = hour
        self.usual = FirstComeFirstServed()

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        return Decision(wake_at=self.hour) if now < self.hour else self.usual.decide(snapshot, now)


def test_the_engine_says_how_long_it_may_rest():
    engine = make_engine(policy=_Sleepy(10.0))
    engine.add(make_request("a", [1, 2, 3], 2))
    assert engine.step() == [] and 0 < engine.rest_seconds() <= 0.1
    engine.clock.advance(9.95)
    assert engine.rest_seconds() == pytest.approx(0.05)
    engine.clock.advance(0.05)
    assert engine.step() and engine.rest_seconds() == 0
