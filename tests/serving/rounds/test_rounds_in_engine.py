"""Rounds in an engine that holds texts: who waits for whom, what is computed once, and what nobody may notice."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import pytest

from kvarn.errors import RequestError
from kvarn.serving.engine import Engine
from kvarn.serving.request import FinishReason, Request
from kvarn.serving.rounds.hints import RoundHint, Segment
from kvarn.serving.rounds.settings import ReuseSettings
from tests.serving.paged_text import continuation, make_engine, make_request, run
from tests.serving.rounds.societies import KINDS, Kind, Part, in_round, member, private, shared, society, words
from tests.serving.text_memory import check_index

TEXTS = [shared(14, 0), shared(9, 1), shared(23, 2)]
IN_PLACE = Kind("collective")


def agents(number: int = 3, texts: Iterable[Part] = TEXTS, **fields: object) -> list[Request]:
    """Members of one round: the same beginning, a history and an order of his own, and a task."""
    texts, requests = list(texts), []
    for agent in range(number):
        turn = agent % len(texts)
        history = ("private", words(4, 99) + words(6 + 3 * agent, agent))
        parts = [history, *texts[turn:], *texts[:turn], ("task", words(5, 90 + agent))]
        requests.append(in_round(agent, parts, of=number, **fields))  # type: ignore[arg-type]
    return requests


def come(engine: Engine, requests: Iterable[Request]) -> None:
    for request in requests:
        engine.add(request)


def expected(requests: Iterable[Request]) -> dict[str, list[int]]:
    return {
        request.id: continuation(request.tokens[: request.prompt_length].tolist(), request.params.max_tokens)
        for request in requests
    }


def at_rest(engine: Engine) -> None:
    """Nothing is held of what has ended."""
    while engine.settle():
        engine.tiers.copier.complete()
    engine.check()
    check_index(engine)
    assert engine.cache.pool.num_active == 0
    assert not any(segment.pins for segment in engine.cache.segments._by_key.values())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_text_is_encoded_once_and_every_answer_is_right(kind: Kind):
    engine, requests = society(kind, num_blocks=120), agents()
    come(engine, requests)
    assert run(engine) == expected(requests)
    counters = engine.rounds.counters
    sinks = 1 if engine.rounds.settings.whole_blocks else 3  # then they are encoded behind one another
    assert counters.encoded_tokens == 2 * sinks + sum(len(tokens) for _, tokens in TEXTS)
    assert counters.reused_tokens > counters.refreshed_tokens > 0
    at_rest(engine)


def test_a_text_is_encoded_behind_each_beginning_of_its_own():
    engine = society(Kind("batched"), num_blocks=120)
    requests = [in_round(i, [private(6 + i, 1 + i), *TEXTS, private(3, 9)], of=3) for i in range(3)]
    come(engine, requests)
    assert run(engine) == expected(requests)
    assert engine.rounds.counters.encoded_tokens == 3 * sum(2 + len(tokens) for _, tokens in TEXTS)


def test_a_round_waits_for_its_members_and_not_for_ever():
    engine, requests = society(IN_PLACE, wait=5.0), agents()
    come(engine, requests[:2])
    engine.step()
    assert engine.rounds.num_held == 2 and not engine.waiting and not engine.running
    assert engine.rest_seconds() > 0.0
    engine.clock.advance(5.0)
    assert engine.rest_seconds() == 0.0
    assert run(engine) == expected(requests[:2])
    engine.add(requests[2])  # too late for the others, and served all the same
    assert run(engine) == expected(requests[2:])
    assert engine.rounds.counters.late_members == 1
    at_rest(engine)


def test_who_comes_late_gets_the_choice_of_his_round():
    engine, requests = society(IN_PLACE, num_blocks=120), agents(4)
    refreshed: list[dict[bytes, frozenset[int]]] = []
    for some in (requests[:3], requests[3:]):
        come(engine, some)
        engine.clock.advance(5.0)
        while engine.rounds.num_held:
            engine.step()
        for request in some:
            assert request.layout is not None
            refreshed.append({each.segment.key: each.refreshed for each in request.layout.placed})
        run(engine)
    assert engine.rounds.counters.selection_passes == 1
    assert all(each == refreshed[0] for each in refreshed)
    at_rest(engine)


@pytest.mark.parametrize("started", [0, 1, 6])
def test_who_comes_twice_is_refused_and_nobody_else_notices(started: int):
    engine, requests = society(IN_PLACE), agents()
    come(engine, requests)
    texts: dict[str, list[int]] = {}
    for _ in range(started):
        for emission in engine.step():
            texts.setdefault(emission.request.id, []).append(emission.token)
    again = in_round(1, [private(3, 7)], of=3)
    again.id = "again"
    with pytest.raises(RequestError) as refused:
        engine.add(again)
    assert refused.value.status == 409 and "again" not in engine.executor.alive
    for id, tokens in run(engine).items():
        texts.setdefault(id, []).extend(tokens)
    assert texts == expected(requests)


def test_one_that_is_too_long_is_refused_and_the_others_go_on():
    engine, requests = society(IN_PLACE, num_blocks=40), agents()
    with pytest.raises(RequestError, match="context"):
        engine.add(in_round(3, [private(160, 3), *TEXTS], of=4))
    come(engine, requests)
    engine.clock.advance(5.0)
    assert run(engine) == expected(requests)


@pytest.mark.parametrize("kind", KINDS[:5], ids=str)
def test_one_may_leave_at_any_moment(kind: Kind):
    for steps in range(0, 14, 2):
        engine, requests = society(kind, token_budget=8), agents()
        come(engine, requests)
        texts: dict[str, list[int]] = {}
        for _ in range(steps):
            for emission in engine.step():
                texts.setdefault(emission.request.id, []).append(emission.token)
        engine.cancel(requests[1].id)
        engine.check()
        for id, tokens in run(engine).items():
            texts.setdefault(id, []).extend(tokens)
        for id, text in expected(requests).items():
            assert texts.get(id, []) == text[: len(texts.get(id, []))]
        assert requests[0].finish_reason == requests[2].finish_reason == FinishReason.LENGTH
        at_rest(engine)


def test_an_agent_that_gave_up_may_come_back_while_the_round_is_open():
    engine, requests = society(IN_PLACE), agents()
    come(engine, requests[:2])
    engine.cancel(requests[1].id)
    engine.add(agents()[1])
    engine.step()
    assert engine.rounds.num_held == 2, "the third one is still to come"
    engine.add(requests[2])
    assert run(engine) == expected(requests)


def test_deadlines_hold_while_a_round_gathers():
    engine, requests = society(IN_PLACE), agents()
    come(engine, requests[:2])
    engine.add(in_round(2, [private(9, 2), *TEXTS], of=3, deadline=1.0, id="R"))
    late = society(IN_PLACE, wait=100.0)
    late.add(agents(deadline=2.0)[0])
    late.step()
    late.clock.advance(3.0)
    ended = late.step()
    assert [emission.finish_reason for emission in ended] == [FinishReason.DEADLINE]
    at_rest(late)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_does_not_matter_who_comes_first(kind: Kind):
    seen = []
    for order in itertools.permutations(range(3)):
        engine, requests = society(kind, num_blocks=120), agents()
        come(engine, [requests[i] for i in order])
        layouts: dict[str, tuple[object, ...]] = {}
        texts: dict[str, list[int]] = {}
        while engine.has_work:
            engine.clock.advance(0.1)
            for emission in engine.step():
                texts.setdefault(emission.request.id, []).append(emission.token)
            for request in requests:
                if request.layout is not None:
                    layout = request.layout
                    layouts[request.id] = (layout.order.tolist(), layout.slots.tolist(), layout.reused)
        seen.append((layouts, texts))
    assert all(each == seen[0] for each in seen)
    assert seen[0][1] == expected(agents())


def test_plain_requests_are_served_the_same_with_rounds_on():
    """What each step computes, whom it serves and where KV lies, beside which nothing else could differ."""
    told = []
    for engine in (society(IN_PLACE, num_blocks=30), make_engine(num_blocks=30)):
        engine.add(make_request("a", words(40, 1), 30))
        engine.add(make_request("b", words(40, 1), 20))
        engine.add(make_request("c", words(17, 2), 60))
        steps = []
        while engine.has_work:
            emitted = [(each.request.id, each.token) for each in engine.step()]
            steps.append((emitted, [(row.request.id, row.count, row.request.blocks) for row in engine.batch.rows]))
        told.append(steps)
    assert told[0] == told[1]


def test_tenants_share_nothing():
    engine = society(IN_PLACE, num_blocks=200)
    requests = [*agents(tenant="one"), *agents(tenant="two")]
    for request in requests:
        request.id += request.tenant
        engine.add(request)
    assert run(engine) == expected(requests)
    assert engine.rounds.counters.encoded_tokens == 2 * (2 + sum(len(tokens) for _, tokens in TEXTS))


def test_a_forced_collision_costs_reuse_and_nothing_else():
    engine, requests = society(IN_PLACE, num_blocks=120, segment_hash=lambda content: b"x"), agents()
    come(engine, requests)
    assert run(engine) == expected(requests)
    assert engine.rounds.counters.encoded_tokens <= 2 + max(len(tokens) for _, tokens in TEXTS)
    at_rest(engine)


def test_segments_that_all_begin_with_are_a_prefix():
    engine = society(IN_PLACE, num_blocks=120)
    requests = [in_round(i, [*TEXTS[:2], private(8, i)], of=3) for i in range(3)]
    come(engine, requests)
    assert run(engine) == expected(requests)
    assert len(engine.cache.segments) == 0 and engine.rounds.counters.reused_tokens == 0
    late = member("late", [*TEXTS[:2], private(8, 5)])
    engine.add(late)
    assert run(engine) == expected([late])
    assert late.cached_tokens >= 20 and len(engine.cache.segments) == 0


def test_a_text_may_stand_in_a_prompt_twice_and_at_its_end():
    for kind in KINDS[:6]:
        engine = society(kind, num_blocks=120)
        requests = [in_round(i, [private(7 + i, i), TEXTS[0], private(3, 8), TEXTS[0]], of=2) for i in range(2)]
        come(engine, requests)
        assert run(engine) == expected(requests)
        assert engine.rounds.counters.encoded_tokens in (16, 2 * 16)  # behind one beginning or two
        assert engine.rounds.counters.reused_tokens > 0
        at_rest(engine)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_was_reused_is_never_a_prefix(kind: Kind):
    engine, requests = society(kind, num_blocks=120), agents()
    come(engine, requests)
    run(engine)
    check_index(engine)
    for request in requests:
        again = make_request(f"plain {request.id}", request.tokens[: request.prompt_length].tolist(), 4)
        engine.add(again)
        assert run(engine) == expected([again])
        assert again.cached_tokens <= request.segments[0].tokens
    check_index(engine)


def test_a_text_that_memory_has_no_room_for_is_computed():
    for room in (0, 1, 6):
        engine, requests = society(IN_PLACE, num_blocks=120, segment_blocks=room), agents()
        come(engine, requests)
        assert run(engine) == expected(requests)
        assert engine.cache.segments.used_blocks <= room
        at_rest(engine)


def test_a_text_that_has_left_the_device_is_brought_back():
    engine = society(IN_PLACE, num_blocks=24)
    first = [private(6, 0), shared(14, 0), private(5, 9)]
    engine.add(member("before", first))
    run(engine)
    engine.add(make_request("fills the device", words(90, 3), 4))
    run(engine)
    engine.add(member("after", first))
    assert run(engine) == {"after": continuation([token for _, tokens in first for token in tokens], 4)}
    assert engine.rounds.counters.loaded_segments == 1 and engine.rounds.counters.encoded_tokens == 16
    at_rest(engine)


@pytest.mark.parametrize("blocks", range(16, 40, 3))
@pytest.mark.parametrize("kind", KINDS[:6], ids=str)
def test_rounds_that_the_pool_has_no_room_for_are_served(kind: Kind, blocks: int):
    engine, requests = society(kind, num_blocks=blocks, token_budget=9), agents(4, TEXTS[:2], count=12)
    come(engine, requests)
    assert run(engine) == expected(requests)
    at_rest(engine)


@pytest.mark.parametrize("kind", KINDS[:5], ids=str)
def test_a_fault_of_the_device_ends_those_it_was_for(kind: Kind):
    for steps in range(6):
        engine, requests = society(kind, token_budget=16, num_blocks=120), agents()
        other = make_request("other", words(9, 77), 30)
        come(engine, [*requests, other])
        texts: dict[str, list[int]] = {}
        for step in range(400):
            engine.rounds.executor.fail_next |= step == steps
            for emission in engine.step():
                texts.setdefault(emission.request.id, []).extend([emission.token] if emission.error is None else [])
        assert texts["other"] == expected([other])["other"]
        for request in requests:
            assert request.finish_reason in (FinishReason.LENGTH, FinishReason.ERROR)
            assert texts[request.id] == expected([request])[request.id][: len(texts[request.id])]
        at_rest(engine)


def test_what_is_certified_together_is_not_reused_alone():
    """Members that see different segments are computed exactly where only encoding together is allowed."""
    said = [list(range(100 * i, 100 * i + 40)) for i in range(1, 4)]
    for alone in (True, False):
        engine = make_engine(num_blocks=256, reuse=ReuseSettings(shortest=8, wait=0.0, alone=alone), segment_blocks=64)
        for i, seen in enumerate(([0, 1], [1, 2])):
            parts = [[900 + i] * 20, *(said[j] for j in seen), [i + 1]]
            kinds = ("private", "shared", "shared", "task")
            request = make_request(
                f"{i}", [token for part in parts for token in part], 3, round=RoundHint("r", 2, f"{i}"),
                segments=tuple(Segment(kind, len(part)) for kind, part in zip(kinds, parts, strict=True)),
            )  # fmt: skip
            engine.add(request)
        texts = run(engine)
        assert engine.rounds.counters.reused_tokens > 0 if alone else engine.rounds.counters.reused_tokens == 0
        assert len(texts) == 2
