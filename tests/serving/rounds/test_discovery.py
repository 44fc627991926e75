"""Texts that prompts have in common are found by what they are, wherever they stand."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvarn.serving.rounds.discovery import Tokens, discover, keep_common, rolling_hash
from kvarn.serving.rounds.spans import Span
from tests.serving.paged_text import run
from tests.serving.rounds.societies import KINDS, Kind, in_round, private, shared, society, words
from tests.serving.rounds.test_rounds_in_engine import TEXTS, agents, at_rest, come, expected

SHORTEST = 8


def draw(rng: np.random.Generator, length: int, vocabulary: int = 30_000) -> Tokens:
    return rng.integers(0, vocabulary, length).astype(np.int32)


def find(prompts: list[Tokens], stored: list[Tokens] = [], **options: object) -> list[list[Span]]:  # noqa: B006
    """What is found, with what always holds."""
    found = discover(prompts, stored, shortest=SHORTEST, **options)  # type: ignore[arg-type]
    texts = [
        {prompt[start:end].tobytes() for start, end in spans} for prompt, spans in zip(prompts, found, strict=True)
    ]
    times = Counter(text for each in texts for text in each)
    assert all(times[text] > 1 or text in {each.tobytes() for each in stored} for text in times)
    for spans in found:
        assert all(span.length >= SHORTEST for span in spans)
        assert all(before.end <= after.start for before, after in itertools.pairwise(spans))
    return found


@st.composite
def societies(draw_from: st.DrawFn) -> tuple[list[Tokens], list[list[Span]], list[Tokens]]:
    """Prompts with texts planted between private ones, and where; each text is in two of them or more."""
    rng = np.random.default_rng(draw_from(st.integers(0, 2**32)))
    vocabulary = draw_from(st.sampled_from([40, 30_000]))
    members = draw_from(st.integers(2, 6))
    lengths = draw_from(st.lists(st.integers(2 * SHORTEST, 60), min_size=1, max_size=5))
    texts = [draw(rng, length, vocabulary) for length in lengths]
    readers = [draw_from(st.sets(st.integers(0, members - 1), min_size=2)) for _ in texts]
    prompts, places = [], []
    for member in range(members):
        parts, spans, position = [], [], 0
        for which in draw_from(st.permutations([i for i in range(len(texts)) if member in readers[i]])):
            parts += [draw(rng, draw_from(st.integers(1, 30)), vocabulary), texts[which]]
            start = position + len(parts[-2])
            position = start + len(texts[which])
            spans.append(Span(start, position))
        prompts.append(np.concatenate([*parts, draw(rng, draw_from(st.integers(0, 20)), vocabulary)]))
        places.append(spans)
    return prompts, places, texts


@settings(max_examples=150, deadline=None)
@given(societies())
def test_planted_texts_are_found_wherever_they_stand(planted: tuple[list[Tokens], list[list[Span]], list[Tokens]]):
    """But for tokens at their ends that two neighbours both have by chance, and that one of them gets."""
    prompts, places, _ = planted
    for spans, expected_spans in zip(find(prompts), places, strict=True):
        assert len(spans) == len(expected_spans)
        for span, expected_span in zip(spans, expected_spans, strict=True):
            assert abs(span.start - expected_span.start) <= 5 and abs(span.end - expected_span.end) <= 5


@settings(max_examples=50, deadline=None)
@given(societies(), st.randoms(use_true_random=False))
def test_the_order_of_prompts_does_not_matter(planted: tuple[list[Tokens], list[list[Span]], list[Tokens]], random):
    prompts, _, texts = planted
    found = find(prompts, texts[:1])
    order = list(range(len(prompts)))
    random.shuffle(order)
    assert find([prompts[i] for i in order], texts[:1]) == [found[i] for i in order]


@settings(max_examples=50, deadline=None)
@given(societies(), st.integers(0, 2**32))
def test_what_nobody_shares_is_not_found_even_if_all_hashes_are_equal(planted, seed: int):
    rng = np.random.default_rng(seed)
    strangers = [40_000 + draw(rng, length) for length in (100, 70, 3, 0, SHORTEST)]

    def same(tokens: Tokens, width: int) -> NDArray[np.uint64]:
        return np.zeros(len(tokens) - width + 1, dtype=np.uint64)

    assert find(strangers) == find(strangers, hash=same) == [[]] * 5
    assert find(strangers, [draw(rng, 20) - 40_000], hash=same) == [[]] * 5
    find(planted[0], planted[2], hash=same)  # less may be found, nothing that is wrong


@settings(max_examples=50, deadline=None)
@given(societies())
def test_stored_texts_are_taken_as_they_are(planted):
    prompts, places, texts = planted
    assert find(prompts, texts) == places
    alone = [prompts[0], np.arange(40_000, 40_050, dtype=np.int32)]
    assert find(alone, texts) == [places[0], []]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=80), min_size=1, max_size=4),
    st.lists(st.lists(st.integers(0, 2), max_size=20), max_size=3),
)
def test_texts_of_few_different_tokens_are_no_trouble(prompts: list[list[int]], stored: list[list[int]]):
    find([np.array(each, dtype=np.int32) for each in prompts], [np.array(each, dtype=np.int32) for each in stored])


def test_texts_in_rotated_orders_between_the_same_separators_are_the_same_for_all():
    rng = np.random.default_rng(0)
    texts, separator = [draw(rng, 40 + i) for i in range(6)], draw(rng, 3)
    prompts = []
    for member in range(6):
        order = [texts[(i + member) % 6] for i in range(6)]
        prompts.append(np.concatenate([draw(rng, 9), *[x for text in order for x in (separator, text)], draw(rng, 9)]))
    found = find(prompts)
    contents = [{p[start:end].tobytes() for start, end in spans} for p, spans in zip(prompts, found, strict=True)]
    assert len(contents[0]) == 6 and all(each == contents[0] for each in contents)
    assert all(sum(span.length for span in spans) >= sum(map(len, texts)) for spans in found)


def test_what_more_prompts_have_is_taken_first():
    rng = np.random.default_rng(0)
    text = draw(rng, 60)
    prompts = [np.concatenate([draw(rng, 5), text]) for _ in range(3)]
    prompts.append(np.concatenate([draw(rng, 4), text[20:40], draw(rng, 6)]))
    found = find(prompts)
    assert found[3] == [Span(4, 24)]
    assert found[0] == found[1] == found[2] == [Span(5, 25), Span(25, 45), Span(45, 65)]


def test_what_stands_before_is_left_alone():
    rng = np.random.default_rng(0)
    text = draw(rng, 40)
    prompts = [np.concatenate([text, draw(rng, 10), text]) for _ in range(2)]
    assert find(prompts, behind=[40, 40]) == [[Span(50, 90)], [Span(50, 90)]]
    assert find(prompts, behind=[40, 60]) == [[Span(60, 90)], [Span(60, 90)]]


def test_hashes_are_of_the_window_alone():
    text = draw(np.random.default_rng(0), 500)
    hashes = rolling_hash(text, 32)
    assert len(hashes) == 469 == len(np.unique(hashes))
    assert np.array_equal(rolling_hash(text[100:200], 32), hashes[100:169])


@pytest.mark.parametrize("always", [True, False])
def test_what_all_have_is_kept_if_it_is_most(always: bool):
    prompts = [np.array([1, 2, 3, 4, 5, 6, 7], dtype=np.int32), np.array([9, 4, 5, 6, 7], dtype=np.int32)]
    spans = [[Span(0, 3), Span(3, 7)], [Span(1, 5)]]
    assert keep_common(prompts, spans, always=always) == [[Span(3, 7)], [Span(1, 5)]]
    little = [[Span(0, 6), Span(6, 7)], [Span(4, 5)]]
    assert keep_common(prompts, little, always=always) == ([[Span(6, 7)], [Span(4, 5)]] if always else little)


@pytest.mark.parametrize("kind", KINDS[:6], ids=str)
def test_prompts_of_a_round_are_reused_though_nobody_says_where(kind: Kind):
    told, untold = (society(kind, num_blocks=120) for _ in range(2))
    come(told, agents())
    run(told)
    requests = agents(told=False)
    come(untold, requests)
    assert run(untold) == expected(requests)
    assert untold.rounds.counters.reused_tokens == told.rounds.counters.reused_tokens > 0
    assert untold.rounds.counters.encoded_tokens == told.rounds.counters.encoded_tokens
    at_rest(untold)


@pytest.mark.parametrize("kind", KINDS[1:4], ids=str)
def test_who_comes_late_and_says_nothing_gets_the_texts_of_his_round(kind: Kind):
    engine, requests = society(kind, num_blocks=120), agents(4, told=False)
    come(engine, requests[:3])
    engine.clock.advance(5.0)
    assert run(engine) == expected(requests[:3])
    encoded, reused = engine.rounds.counters.encoded_tokens, engine.rounds.counters.reused_tokens
    come(engine, requests[3:])
    assert run(engine) == expected(requests[3:])
    assert engine.rounds.counters.encoded_tokens == encoded and engine.rounds.counters.reused_tokens > reused
    at_rest(engine)


def test_who_says_nothing_gets_what_the_others_told():
    engine = society(Kind("batched"), num_blocks=120)
    requests = [*agents(told=True)[:2], agents(told=False)[2]]
    come(engine, requests)
    assert run(engine) == expected(requests)
    assert engine.rounds.counters.encoded_tokens == 6 + sum(len(tokens) for _, tokens in TEXTS)
    at_rest(engine)


def test_texts_are_looked_for_in_rounds_alone():
    engine = society(Kind("collective"), num_blocks=120)
    requests = agents(told=False)
    for request in requests:
        request.round = None
    come(engine, requests)
    assert run(engine) == expected(requests)
    assert engine.rounds.counters.reused_tokens == 0 and len(engine.cache.segments) == 0


def test_private_parts_are_left_private():
    engine = society(Kind("collective"), num_blocks=120)
    requests = [in_round(i, [private(9 + i, i), ("private", words(30, 60)), shared(14, 0)], of=3) for i in range(3)]
    come(engine, requests)
    assert run(engine) == expected(requests)
    assert engine.rounds.counters.encoded_tokens == 2 + 14
