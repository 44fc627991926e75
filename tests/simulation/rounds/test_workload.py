"""Societies as they are drawn, and what their agents are told: always the same, of the shapes that were promised."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.bench.prompts import load_tokenizer
from kvarn.simulation.rounds.progress import Ask, SocietyRun
from kvarn.simulation.rounds.scenarios import HISTORY, SCENARIOS, Society, Span, find_scenario, scenarios_of
from kvarn.simulation.rounds.texts import CHATML, RoundTexts, ScenarioTexts, SeededTexts
from kvarn.simulation.rounds.workload import (
    HistoryStyle,
    Order,
    RoundWorkload,
    SocietySpec,
    agent_name,
    draw_societies,
)
from kvarn.simulation.workloads import WorkloadError
from tests.conftest import MODEL

SMALL = RoundWorkload(agents=4, rounds=3, history=Span(20, 40), output=Span(4, 9), task_tokens=8)
IDS = SeededTexts(100, 5000)


def play(spec: SocietySpec, texts: RoundTexts = IDS) -> list[list[Ask]]:
    """The requests of each round; each agent says its name's letters, then counts."""
    run = SocietyRun(spec, texts)
    rounds = [run.start()]
    while not run.done:
        for ask in rounds[-1][::-1]:
            said = [200 + ask.agent, *range(1000 * ask.round + 1, 1000 * ask.round + ask.output_tokens)]
            following = run.answered(ask.agent, said)
        rounds.append(following)
    return rounds[:-1]


def of(ask: Ask, kind: str) -> list[list[int]]:
    return [part.tokens.tolist() for part in ask.parts if part.kind == kind]


@pytest.mark.parametrize("scenario", [each.name for each in SCENARIOS])
def test_a_scenario_has_the_sizes_of_its_kind(scenario: str) -> None:
    [spec] = draw_societies(RoundWorkload(scenario, seed=3))
    about = find_scenario(scenario)
    few, many = range(4, 17), range(8, 65)
    assert len(spec.agents) == about.agents
    assert about.agents in (few if about.society is Society.generative else many)
    low, high = HISTORY[about.society]
    assert all(low <= agent.history_tokens <= high for agent in spec.agents)
    assert all(32 <= turn.output_tokens <= 128 for turns in spec.rounds for turn in turns)
    assert len({agent.name for agent in spec.agents}) == len(spec.agents)


def test_there_are_eight_scenarios_of_generative_agents() -> None:
    names = [each.name for each in scenarios_of(Society.generative)]
    assert len(names) == 8 and {"meet-and-greet", "valentines-party", "information-outbreak"} <= set(names)
    assert len(scenarios_of(Society.agentsociety)) >= 3


def test_the_same_workload_is_the_same_and_another_seed_is_another() -> None:
    assert draw_societies(SMALL) == draw_societies(SMALL)
    assert draw_societies(SMALL) != draw_societies(replace(SMALL, seed=1))
    for texts in (IDS, SeededTexts(100, 5000)):
        prompts = [ask.prompt.tolist() for asks in play(draw_societies(SMALL)[0], texts) for ask in asks]
        assert prompts == [ask.prompt.tolist() for asks in play(draw_societies(SMALL)[0]) for ask in asks]


def test_more_agents_and_more_rounds_leave_the_first_ones_as_they_were() -> None:
    [spec] = draw_societies(SMALL)
    [larger] = draw_societies(replace(SMALL, agents=9))
    [longer] = draw_societies(replace(SMALL, rounds=6))
    assert larger.agents[:4] == spec.agents
    assert [turn.output_tokens for turn in larger.rounds[2][:4]] == [turn.output_tokens for turn in spec.rounds[2]]
    assert (longer.agents, longer.rounds[:3]) == (spec.agents, spec.rounds)


def test_a_prompt_is_private_history_what_was_said_and_a_task() -> None:
    [spec] = draw_societies(SMALL)
    rounds = play(spec)
    assert [len(asks) for asks in rounds] == [4, 4, 4]
    for number, asks in enumerate(rounds):
        for ask, agent in zip(asks, spec.agents, strict=True):
            assert [part.kind for part in ask.parts] == ["private", *["shared"] * 4, "task"]
            assert (ask.hint.id, ask.hint.size, ask.hint.agent) == (f"meet-and-greet-0/{number}", 4, agent.name)
            assert [segment.tokens for segment in ask.segments] == [len(part.tokens) for part in ask.parts]
            assert len(ask.parts[-1].tokens) == 8
            wanted = [spec.heard_tokens(number, other) for other in spec.rounds[number][ask.agent].sees]
            assert [len(tokens) for tokens in of(ask, "shared")] == wanted
            if number:
                assert {tokens[0] for tokens in of(ask, "shared")} == {200, 201, 202, 203}
    first = [len(of(ask, "private")[0]) for ask in rounds[0]]
    assert first == [agent.history_tokens for agent in spec.agents]


@pytest.mark.parametrize("order", Order)
def test_agents_read_the_same_segments_in_their_order(order: Order) -> None:
    [spec] = draw_societies(replace(SMALL, order=order, agents=5))
    orders = [tuple(part.id for part in ask.parts if part.id) for ask in play(spec)[1]]
    assert {frozenset(each) for each in orders} == {frozenset(f"0/{agent.name}" for agent in spec.agents)}
    if order is Order.same:
        assert len(set(orders)) == 1
    elif order is Order.rotated:
        assert [each[0] for each in orders] == [f"0/{agent.name}" for agent in spec.agents]
    else:
        assert len(set(orders)) > 1


@given(st.integers(1, 12), st.floats(0.01, 1.0), st.sampled_from(Order))
def test_an_agent_sees_its_share_of_others_and_nobody_twice(agents: int, visibility: float, order: Order) -> None:
    [spec] = draw_societies(replace(SMALL, agents=agents, visibility=visibility, order=order))
    for turns in spec.rounds:
        for turn in turns:
            assert len(turn.sees) == len(set(turn.sees)) == max(1, round(visibility * agents))
            assert set(turn.sees) <= set(range(agents))


def test_a_rolling_history_keeps_its_beginning_and_gains_a_line_a_round() -> None:
    [spec] = draw_societies(replace(SMALL, rounds=5, summary_tokens=3, remembered=2))
    rounds = play(spec)
    for agent in range(4):
        first, *later = [of(asks[agent], "private")[0] for asks in rounds]
        assert all(history[: len(first)] == first for history in later)
        lines = [[200 + agent, 1000 * number + 1, 1000 * number + 2] for number in range(4)]
        lines[0][1:] = [1, 2]
        ends = [history[len(first) :] for history in later]
        assert ends == [lines[0], lines[0] + lines[1], lines[1] + lines[2], lines[2] + lines[3]]


def test_an_appending_history_is_all_that_went_before() -> None:
    [spec] = draw_societies(replace(SMALL, style=HistoryStyle.append))
    rounds = play(spec)
    for before, after in pairwise(rounds):
        for old, new in zip(before, after, strict=True):
            kept = old.prompt.tolist()
            assert new.prompt.tolist()[: len(kept) + 1] == [*kept, 200 + old.agent]
            assert new.parts[: len(old.parts) - 1] == old.parts[:-1], "what was shared is still said to be"
    longest = max(len(ask.prompt) + ask.output_tokens for asks in rounds for ask in asks)
    assert spec.longest_context == longest


@pytest.mark.parametrize("tokens", [[], [7] * 100])
def test_answers_are_neither_empty_nor_too_long(tokens: list[int]) -> None:
    [spec] = draw_societies(SMALL)
    run = SocietyRun(spec, IDS)
    wanted = [ask.output_tokens for ask in run.start()]
    following = [run.answered(agent, tokens) for agent in range(4)]
    assert following[:3] == [[]] * 3
    heard = {part.id: len(part.tokens) for part in following[3][0].parts if part.kind == "shared"}
    expected = wanted if tokens else [1] * 4
    assert heard == {f"0/{agent.name}": count for agent, count in zip(spec.agents, expected, strict=True)}
    with pytest.raises(ValueError, match="nothing waits for"):
        run.answered(4, [1])


def test_stragglers_think_and_the_others_do_not() -> None:
    [spec] = draw_societies(replace(SMALL, rounds=200, stragglers=0.25, think_seconds=2.0))
    seconds = np.array([turn.think_seconds for turns in spec.rounds for turn in turns])
    assert 0.18 < (seconds > 0).mean() < 0.32
    assert 1.5 < seconds[seconds > 0].mean() < 2.5


def test_societies_begin_when_those_before_have_had_time_for_their_rounds() -> None:
    assert [spec.arrival for spec in draw_societies(replace(SMALL, societies=3, qps=2.0))] == [0.0, 1.5, 3.0]
    assert [spec.arrival for spec in draw_societies(replace(SMALL, societies=2))] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scenario": "moon"}, "scenario is 'moon'; expected one of meet-and-greet"),
        ({"rounds": 0}, "rounds is 0; expected at least 1"),
        ({"visibility": 0.0}, "visibility is 0.0"),
        ({"stragglers": 1.5}, "stragglers is 1.5"),
        ({"qps": float("nan")}, "qps is nan"),
        ({"history": Span(9, 3)}, "history is 9:3"),
    ],
)
def test_what_cannot_be_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        draw_societies(replace(SMALL, **fields))  # type: ignore[arg-type]


def test_spans_are_read_as_people_write_them() -> None:
    assert (Span.parse("256", "history"), Span.parse("128:512", "history")) == (Span(256, 256), Span(128, 512))
    for text in ("many", "5:", "0", "4:2"):
        with pytest.raises(WorkloadError, match="history is"):
            Span.parse(text, "history")


def test_scenario_texts_are_english_of_exact_lengths() -> None:
    words = load_tokenizer(MODEL)
    texts = ScenarioTexts(lambda text: words.encode(text, add_special_tokens=False).ids)
    [spec] = draw_societies(replace(SMALL, history=Span(64, 200), output=Span(16, 20), task_tokens=30, agents=3))
    rounds = play(spec, texts)
    again = play(spec, texts)
    assert [ask.prompt.tolist() for asks in rounds for ask in asks] == [
        ask.prompt.tolist() for asks in again for ask in asks
    ]
    for agent, ask in zip(spec.agents, rounds[0], strict=True):
        history, *heard, task = (part.tokens for part in ask.parts)
        assert (len(history), len(task)) == (agent.history_tokens, 30)
        text = words.decode(history.tolist())
        assert text.startswith(f"You are {agent.name},") and "the kitchen of a shared house" in text
        assert words.decode(task.tolist()).endswith(f"ask somebody one thing. Be brief.\n{agent.name}:")
        labels = sorted(words.decode(part.tolist()).split(":")[0] for part in heard)
        assert labels == sorted(f"\n{other.name}" for other in spec.agents)


def test_short_tasks_of_scenario_texts_still_end_with_the_agents_turn() -> None:
    words = load_tokenizer(MODEL)
    texts = ScenarioTexts(lambda text: words.encode(text, add_special_tokens=False).ids)
    [spec] = draw_societies(replace(SMALL, task_tokens=4))
    for agent, ask in enumerate(play(spec, texts)[2]):
        assert words.decode(ask.parts[-1].tokens.tolist()).endswith(f"{agent_name(agent)}:")
        assert len(ask.parts[-1].tokens) == 4


def test_a_frame_is_part_of_history_and_task() -> None:
    words = load_tokenizer(MODEL)
    encode = lambda text: words.encode(text, add_special_tokens=False).ids  # noqa: E731
    texts = ScenarioTexts(encode, frame=CHATML)
    [spec] = draw_societies(replace(SMALL, history=Span(40, 60), task_tokens=32))
    for agent, ask in zip(spec.agents, play(spec, texts)[0], strict=True):
        history, *_, task = ask.parts
        assert (len(history.tokens), len(task.tokens)) == (agent.history_tokens, 32)
        text = words.decode(ask.prompt.tolist(), skip_special_tokens=False)
        assert text.startswith(f"<|im_start|>system\nYou are {agent.name},")
        assert text.endswith(f" You are {agent.name}.<|im_end|>\n<|im_start|>assistant\n")
        assert text.count("<|im_start|>") == 3
    with pytest.raises(WorkloadError, match="a history of 5 tokens; expected more than"):
        play(draw_societies(replace(SMALL, history=Span(5, 5)))[0], texts)
