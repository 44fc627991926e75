"""Drafting: what is guessed, when it pays, and that text stays what it is without, whatever comes between."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.serving.batch import Batch, SampledToken
from kvarn.serving.engine import Engine
from kvarn.serving.request import FinishReason
from kvarn.serving.speculation import MATCH_TOKENS, Lookup, Speculator, StepCost

from .paged_text import make_engine, make_request, next_token, run


def repetitive(context: list[int]) -> int:
    """A model whose text repeats itself, and now and then turns to something else."""
    return (context[-1] + 1 + len(context) // 11 % 3) % 7


def continuation(prompt: list[int], count: int) -> list[int]:
    context = list(prompt)
    for _ in range(count):
        context.append(repetitive(context))
    return context[len(prompt) :]


def make(drafts: int = 4, *, auto: bool = False, **settings: int) -> Engine:
    engine = make_engine(**settings)
    engine.executor.next_token = repetitive  # type: ignore[attr-defined]
    engine.speculator = Speculator(drafts, only_where_it_pays=auto)
    return engine


def test_what_followed_the_same_tokens_before_is_drafted():
    request = make_request("r", [1, 2, 3, 4, 5, 6, 1, 2, 3], 20)
    assert Lookup(request).draft(3, 0.0) == [4, 5, 6]


def test_a_repetition_without_end_is_drafted_on():
    request = make_request("r", [9, 1, 2, 1, 2, 1, 2], 20)
    assert Lookup(request).draft(5, 0.0) == [1, 2, 1, 2, 1]


def test_the_longest_match_is_followed_and_the_latest_of_equals():
    longest = make_request("r", [7, 1, 2, 3, 50, 0, 1, 2, 3, 60, 7, 1, 2, 3], 20)
    assert Lookup(longest).draft(1, 0.0) == [50]
    latest = make_request("r", [7, 1, 2, 3, 50, 7, 1, 2, 3, 60, 7, 1, 2, 3], 20)
    assert Lookup(latest).draft(1, 0.0) == [60]


def test_new_text_drafts_nothing():
    assert Lookup(make_request("r", list(range(50)), 20)).draft(8, 0.0) == []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=80), st.lists(st.integers(0, 2), max_size=40))
def test_a_draft_continues_an_earlier_place(prompt, output):
    """Law: a drafted token is one that once followed the tokens before it; reading token by token changes nothing."""
    request = make_request("r", prompt, 100)
    lookup = Lookup(request)
    for token in output:
        lookup.draft(2, 0.0)
        request.append(token)
    text = prompt + output
    draft = lookup.draft(6, 0.0)
    runs = [tuple(text[i : i + MATCH_TOKENS]) for i in range(len(text) - MATCH_TOKENS + 1)]
    assert bool(draft) >= (len(runs) != len(set(runs)) and runs.count(runs[-1]) > 1)
    for token in draft:
        assert (*text[-MATCH_TOKENS:], token) in {
            tuple(text[i : i + MATCH_TOKENS + 1]) for i in range(len(text) - MATCH_TOKENS)
        }
        text.append(token)


def test_guesses_that_fail_end_drafting_and_ones_that_hold_bring_it_back():
    request = make_request("r", [1, 2, 3, 9], 2000)
    lookup = Lookup(request)
    for i in range(20):  # the same three tokens, never with the same sequel
        for token in (1, 2, 3, 100 + i):
            request.append(token)
            lookup.draft(0, 0.0)
    for token in (1, 2, 3):
        request.append(token)
    assert lookup.draft(4, 0.2) == []
    for _ in range(10):
        for token in (1, 2, 3, 4, 5, 6, 7, 8):
            request.append(token)
            lookup.draft(0, 0.0)
    assert len(lookup.draft(4, 0.2)) == 4


def test_rows_pay_while_their_chance_is_above_their_share_of_the_step():
    cost = StepCost()
    assert cost.least_chance == 1.0, "nothing is known: nothing pays"
    for step in range(400):
        rows = 1 + step % 4
        cost.note(rows, 1, 0.010 + 0.001 * rows)
    assert cost.least_chance == pytest.approx(0.001 * 1 / 0.0125, rel=0.1)
    for _ in range(400):
        cost.note(32, 32, 0.042)
    assert cost.least_chance > 0.6
    before = cost.least_chance
    cost.note(32, 32, 30.0)
    assert cost.least_chance == pytest.approx(before, rel=0.1), "one pause of the machine says little"


def test_drafts_come_true_and_save_steps():
    plain, drafting = make(), make()
    plain.speculator = None
    for engine in (plain, drafting):
        engine.add(make_request("r", [1, 2], 60))
    assert run(drafting) == run(plain) == {"r": continuation([1, 2], 60)}
    assert drafting.counters.steps < 0.7 * plain.counters.steps
    assert 0 < drafting.counters.accepted_tokens <= drafting.counters.drafted_tokens
    assert plain.counters.output_tokens == drafting.counters.output_tokens == 60


def _seconds(engine: Engine, batch: int, next_token: Callable[[list[int]], int]) -> float:
    """Time of 4 rounds of `batch` requests on a machine whose steps cost 7 ms and 1 ms a row."""
    executor, execute = engine.executor, engine.executor.execute

    def timed(rows: Batch) -> list[list[SampledToken]]:
        engine.clock.advance(0.007 + 0.001 * rows.num_tokens)  # type: ignore[attr-defined]
        return execute(rows)

    executor.execute = timed  # type: ignore[method-assign]
    executor.next_token = next_token  # type: ignore[attr-defined]
    for i in range(4 * batch):
        engine.add(make_request(f"r{i}", [i % 7, i % 5], 60, arrival=float(i), tenant=str(i)))
    while engine.has_work:
        engine.step()
    return engine.clock.now()


def _hardly_repetitive(context: list[int]) -> int:
    return repetitive(context) if len(context) // 5 % 3 else next_token(context) % 90


@pytest.mark.parametrize("batch", [1, 4, 16, 32])
@pytest.mark.parametrize(("text", "gain_alone"), [(repetitive, 0.8), (_hardly_repetitive, 1.0), (next_token, 1.0)])
def test_auto_gains_where_it_can_and_costs_next_to_nothing_elsewhere(batch, text, gain_alone):
    limits = {"num_blocks": 3000, "token_budget": 512, "max_running": batch}
    plain, auto = make_engine(**limits), make(8, auto=True, **limits)
    for engine in (plain, auto):
        engine._check = False
    ratio = _seconds(auto, batch, text) / _seconds(plain, batch, text)
    assert ratio < 1.02
    assert batch > 1 or ratio <= gain_alone


REQUESTS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), min_size=1, max_size=10)


@settings(max_examples=80, deadline=None)
@given(REQUESTS, st.integers(18, 60), st.integers(1, 24), st.integers(1, 6), st.integers(1, 9), st.randoms())
def test_text_is_the_same_with_drafts_whatever_the_schedule(requests, num_blocks, budget, max_running, drafts, rng):
    """Law: drafts, preemption, shared prefixes, cancellation and arrival order never change what is generated."""
    engine = make(drafts, num_blocks=num_blocks, token_budget=budget, max_running=max_running)
    waiting = [
        make_request(f"r{i}", [(i % 3 + j) % 5 for j in range(length)], count)
        for i, (length, count) in enumerate(requests)
    ]
    expected = {r.id: continuation(r.tokens[: r.prompt_length].tolist(), r.params.max_tokens) for r in waiting}
    texts: dict[str, list[int]] = {id: [] for id in expected}
    cancelled = set()
    for _ in range(5000):
        if waiting and rng.random() < 0.5:
            request = waiting.pop()
            request.arrival = engine.clock.now()
            engine.add(request)
        if rng.random() < 0.05:
            cancelled.add(id := f"r{rng.randrange(len(requests))}")
            engine.cancel(id)
        if not waiting and not engine.has_work:
            break
        engine.clock.advance(1.0)
        for emission in engine.step():
            if emission.token is not None:
                texts[emission.request.id].append(emission.token)
    for id, text in texts.items():
        assert text == expected[id] if id not in cancelled else text == expected[id][: len(text)]
    assert engine.cache.pool.num_active == 0
    assert not engine.speculator._lookups


def test_nothing_comes_after_a_stop_token_within_a_draft():
    engine = make(8)
    prompt = [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    request = make_request("r", prompt, 60)
    engine.executor.next_token = lambda context: (context[-1] + 1) % 7  # type: ignore[attr-defined]
    request.stop_tokens = frozenset({5})
    engine.add(request)
    assert run(engine) == {"r": [3, 4, 5]}
    assert request.finish_reason is FinishReason.STOP
    assert engine.counters.steps == 2 and engine.counters.drafted_tokens > 2


def test_prefix_cache_holds_verified_tokens_only():
    engine = make(8, num_blocks=200, token_budget=64)
    rng = random.Random(5)
    for i in range(12):
        engine.add(make_request(f"r{i}", [rng.randrange(5) for _ in range(6)], 50, arrival=float(i)))
    while engine.has_work:
        engine.step()
        for entry in engine.cache.index._by_block.values():
            held = engine.executor.memory[entry.block]  # type: ignore[attr-defined]
            assert held.tolist() == np.frombuffer(entry.tokens, dtype=np.int32).tolist()
    assert engine.counters.drafted_tokens > engine.counters.accepted_tokens > 0
