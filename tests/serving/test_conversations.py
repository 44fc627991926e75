"""Rounds of agents that go on, on a real model: what was computed once is found again, and nothing else changes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from kvarn.models.sources import ModelFiles
from kvarn.serving.assemble import load_engine
from kvarn.serving.config import EngineConfig
from kvarn.serving.conversations import Conversations
from kvarn.serving.engine import Engine
from kvarn.serving.request import Request
from kvarn.serving.rounds.hints import RoundHint, Segment, SegmentKind
from kvarn.serving.sampling.params import SamplingParams
from tests.models.tiny import SIZES, save_model

MIB = 2**20
SIZE = 8
AGENTS = 3
ANSWER = 6
Part = tuple[SegmentKind, list[int]]
Told = tuple[list[int], list[list[tuple[int, float]]], Request]
"""Tokens, the likeliest alternatives of each, and the request."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return save_model(LlamaConfig(**SIZES | {"max_position_embeddings": 1024}), tmp_path_factory.mktemp("tiny"))


def society(model: ModelFiles, *, remembers: bool = True, **settings: object) -> Engine:
    """Without `remembers`, what is found is laid out as it was, and computed again."""
    config = {
        "precision": "float32", "max_context": 600, "block_size": SIZE, "kv_memory_bytes": 4 * MIB, "threads": 1,
        "speculation": "off", "reuse": "collective", "reuse_share": 0.25, "round_wait": 1.0, "token_budget": 96,
        "prefill_budget": 96,
    }  # fmt: skip
    engine = load_engine(EngineConfig(model=str(model.folder), **config | settings)).engine  # type: ignore[arg-type]
    engine._check = True
    if not remembers:
        kept_by(engine).own_tokens = lambda request: 0  # type: ignore[method-assign]
    return engine


def kept_by(engine: Engine) -> Conversations:
    assert engine.rounds is not None and engine.rounds.kept is not None
    return engine.rounds.kept


def words(length: int, seed: int) -> list[int]:
    return [3 + (seed * 53 + i * (7 + 2 * seed)) % 190 for i in range(length)]


def ask(
    id: str, parts: list[Part], *, round: str = "", size: int = AGENTS, agent: str = "", **fields: object
) -> Request:
    prompt = [token for _, tokens in parts for token in tokens]
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True, logprobs=20)
    return Request.create(
        id, prompt, params, arrival=0.0, segments=tuple(Segment(kind, len(tokens)) for kind, tokens in parts),
        round=RoundHint(round, size, agent) if round else None, **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def answers(engine: Engine, *requests: Request) -> dict[str, Told]:
    for request in requests:
        engine.add(request)
    told: dict[str, Told] = {request.id: ([], [], request) for request in requests}
    for _ in range(3000):
        if not engine.has_work:
            return told
        for emission in engine.step():
            assert emission.error is None
            if emission.token is not None and emission.logprobs is not None:
                told[emission.request.id][0].append(emission.token)
                told[emission.request.id][1].append(emission.logprobs.top)
    raise AssertionError("it does not come about")


def first_parts(agent: int) -> list[Part]:
    """Two shared texts, in an order of his own, behind a history of his own."""
    texts = [words(45, 40), words(38, 41)]
    one, other = (texts[0], texts[1]) if agent % 2 else (texts[1], texts[0])
    return [
        ("private", words(19 + 9 * agent, agent)), ("shared", one), ("private", words(7 + agent, 10 + agent)),
        ("shared", other), ("task", words(9, 20)),
    ]  # fmt: skip


def next_parts(agent: int, parts: list[Part], answer: list[int], *, said: bool = True) -> list[Part]:
    """All that he has seen and said, what others have said since, and a new task."""
    old: list[Part] = parts if said else [("private", [token for _, tokens in parts for token in tokens])]
    return [
        *old, ("private", answer), ("private", words(5 + agent, 30 + agent)), ("shared", words(41, 42)),
        ("task", words(11, 21)),
    ]  # fmt: skip


def first_round(engine: Engine, **fields: object) -> dict[int, tuple[list[Part], list[int]]]:
    """What each agent was told and has said."""
    parts = {agent: first_parts(agent) for agent in range(AGENTS)}
    told = answers(
        engine, *(ask(f"a{i}", parts[i], round="first", agent=f"agent {i}", **fields) for i in parts)
    )  # fmt: skip
    return {i: (parts[i], told[f"a{i}"][0]) for i in parts}


def whole_of(said: tuple[list[Part], list[int]]) -> list[int]:
    return [token for _, tokens in said[0] for token in tokens] + said[1]


def second_round(engine: Engine, before: dict[int, tuple[list[Part], list[int]]], **fields: object) -> dict[str, Told]:
    said, round = bool(fields.pop("said", True)), str(fields.pop("round", "second"))
    parts = {i: next_parts(i, *before[i], said=said) for i in before}
    return answers(engine, *(ask(f"b{i}", parts[i], round=round, agent=f"agent {i}", **fields) for i in parts))


def tokens_of(told: dict[str, Told]) -> dict[str, list[int]]:
    return {id: tokens for id, (tokens, _, _) in told.items()}


def assert_alike(some: dict[str, Told], others: dict[str, Told]) -> None:
    assert some.keys() == others.keys()
    for id, (tokens, tops, _) in some.items():
        assert tokens == others[id][0], id
        for one, other in zip(tops, others[id][1], strict=True):
            assert [token for token, _ in one] == [token for token, _ in other]
            assert np.allclose([value for _, value in one], [value for _, value in other], atol=1e-4)


@pytest.mark.parametrize("mode", ["collective", "lego"])
@pytest.mark.parametrize("said", [True, False])
def test_what_was_computed_is_not_computed_again_and_nothing_else_changes(
    model: ModelFiles, mode: str, said: bool
) -> None:
    """Whether or not the client says again where the old shared texts are."""
    engine, anew = society(model, reuse=mode), society(model, remembers=False, reuse=mode)
    before = first_round(engine)
    assert before == first_round(anew)
    resumed, computed = second_round(engine, before, said=said), second_round(anew, before, said=said)
    assert_alike(resumed, computed)
    facts, gained = engine.rounds.facts(), 0
    for i, (parts, answer) in before.items():
        request, other = resumed[f"b{i}"][2], computed[f"b{i}"][2]
        old = sum(len(tokens) for _, tokens in parts) + len(answer) - 1  # nobody looked at the last token's KV
        new = other.prompt_length - old
        assert old <= request.cached_tokens < old + new
        assert request.reused_tokens == other.reused_tokens
        gained += request.cached_tokens - other.cached_tokens
    assert (facts.resumed_requests, facts.resumed_tokens) == (AGENTS, gained)
    assert 0 < facts.mirror_bytes < facts.dense_bytes
    for each in (engine, anew):
        assert each.cache.pool.num_active == 0
        assert not any(segment.pins for segment in each.rounds.store._by_key.values())


def resumptions(engine: Engine) -> int:
    assert engine.rounds is not None
    return engine.rounds.facts().resumed_requests


def test_they_go_on_round_after_round_and_what_is_superseded_goes_first(model: ModelFiles) -> None:
    engine = society(model)
    before = first_round(engine)
    for turn in range(3):
        parts = {i: next_parts(i, *before[i]) for i in before}
        told = answers(
            engine, *(ask(f"c{turn}{i}", parts[i], round=f"round {turn}", agent=f"agent {i}") for i in parts)
        )
        before = {i: (parts[i], told[f"c{turn}{i}"][0]) for i in parts}
        assert resumptions(engine) == AGENTS * (turn + 1)
    mirrors, last = kept_by(engine).mirrors, kept_by(engine).find(ask("x", [("private", [*whole_of(before[0]), 7])]), 0)
    assert last is not None
    assert mirrors.evict(1) > 0
    assert all((last.family, f"agent {i}") in mirrors for i in before)
    fork = ask("fork", [("private", [*whole_of(before[0]), 7])])
    answers(engine, fork)
    assert fork.cached_tokens == fork.prompt_length - 2, "all but the last answer's last token, and what is new"


def test_what_is_lost_or_not_the_same_is_computed_again(model: ModelFiles) -> None:
    engine = society(model)
    before = first_round(engine)
    anew, kept = second_round(society(model, mirror_memory_bytes=0), before), kept_by(engine)
    other = {i: (parts, [answer[0] ^ 1, *answer[1:]]) for i, (parts, answer) in before.items()}
    second_round(engine, other, round="other")
    assert resumptions(engine) == 0, "they never said that"
    for i in before:
        parts = next_parts(i, *before[i])
        answers(engine, ask(f"t{i}", parts, round="third", agent=f"agent {i}", tenant="somebody else", size=1))
        assert resumptions(engine) == 0, "another's"
    for family, member in list(kept.mirrors.members()):
        kept.mirrors.drop(family, member)
    told = second_round(engine, before)
    assert resumptions(engine) == 0
    assert tokens_of(told) == tokens_of(anew)


def test_they_are_found_after_a_restart_unless_they_are_damaged(model: ModelFiles, tmp_path: Path) -> None:
    settings = {"disk_cache": str(tmp_path)}
    engine = society(model, **settings)
    before = first_round(engine)
    going_on = second_round(engine, before)
    engine.close()
    again = society(model, **settings)
    encoded = again.rounds.facts().encoded_tokens
    resumed = second_round(again, before)
    assert resumptions(again) == AGENTS
    assert again.rounds.facts().encoded_tokens - encoded == 41 + again.rounds.settings.sink_tokens, "the new one"
    assert_alike(resumed, going_on)
    again.close()
    for file in tmp_path.glob("mirrors-*.kv"):
        os.truncate(file, file.stat().st_size // 8)  # what is missing reads as zeros
    damaged = society(model, **settings)
    told = second_round(damaged, before)
    assert resumptions(damaged) == 0
    assert tokens_of(told) == tokens_of(second_round(society(model, mirror_memory_bytes=0), before))
    damaged.close()
    elsewhere = society(model, **settings, reuse_share=0.5)
    second_round(elsewhere, before)
    assert resumptions(elsewhere) == 0, "made with other settings"
    elsewhere.close()


def test_preempted_and_cancelled_members_get_it_back_and_let_it_go(model: ModelFiles) -> None:
    engine = society(model)
    before = first_round(engine)
    parts = {i: next_parts(i, *before[i]) for i in before}
    forgetful = society(model, remembers=False)
    assert before == first_round(forgetful)
    whole = second_round(forgetful, before)
    requests = [ask(f"b{i}", parts[i], round="second", agent=f"agent {i}") for i in parts]
    for request in requests:
        engine.add(request)
    while not requests[1].num_outputs:
        engine.step()
    engine._preempt(requests[1])
    engine.cancel("b2")
    told: list[int] = requests[1].known_tokens[requests[1].prompt_length :].tolist()
    while engine.has_work:
        told += [each.token for each in engine.step() if each.request is requests[1] and each.token is not None]
    assert told == whole["b1"][0]
    assert engine.cache.pool.num_active == 0
    assert not kept_by(engine)._resumed
