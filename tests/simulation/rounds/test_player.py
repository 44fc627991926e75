"""Societies on a simulated engine: the same every time, one round after the other, times that add up."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.simulation.assemble import simulated_engine
from kvarn.simulation.rounds.capacity import most_agents, most_holding
from kvarn.simulation.rounds.player import play_rounds
from kvarn.simulation.rounds.report import RoundsRun, render
from kvarn.simulation.rounds.scenarios import Span
from kvarn.simulation.rounds.workload import HistoryStyle, RoundWorkload, draw_societies

A100, QWEN = load_accelerator("a100-80"), load_model_shape("qwen2.5-14b")
WORKLOAD = RoundWorkload(agents=4, rounds=3, output=Span(16, 32), societies=2, qps=2.0, stragglers=0.2)
SPECS = draw_societies(WORKLOAD)


def make_engine(check: bool = True, **fields: object) -> Engine:
    usual = {"speculation": "off", "max_running": 64, "kv_memory_bytes": int(30_000 * QWEN.kv_bytes_per_token())}
    engine = simulated_engine(EngineConfig(**(usual | fields)), A100, QWEN)  # type: ignore[arg-type]
    engine._check = check
    return engine


@pytest.fixture(scope="module")
def played() -> RoundsRun:
    return play_rounds(make_engine(), SPECS)


def test_a_run_is_the_same_every_time(played: RoundsRun) -> None:
    assert play_rounds(make_engine(), SPECS).to_json() == played.to_json()


def test_every_round_of_every_society_ends(played: RoundsRun) -> None:
    done = sorted((record.society, record.round, record.agents) for record in played.rounds)
    assert done == [(spec.id, number, 4) for spec in SPECS for number in range(3)]
    wanted = sum(turn.output_tokens for spec in SPECS for turns in spec.rounds for turn in turns)
    assert played.summary()["output_tokens"] == wanted
    assert not played.failures and played.peak_blocks


def test_a_round_begins_with_the_last_answer_of_the_one_before(played: RoundsRun) -> None:
    ends = {(record.society, record.round): record.end for record in played.rounds}
    thinks = {
        (spec.id, number, spec.agents[agent].name): turn.think_seconds
        for spec in SPECS
        for number, turns in enumerate(spec.rounds)
        for agent, turn in enumerate(turns)
    }
    assert any(thinks.values())
    arrivals = {spec.id: spec.arrival for spec in SPECS}
    for turn in played.turns:
        ready = ends[turn.society, turn.round - 1] if turn.round else arrivals[turn.society]
        assert turn.ready == ready
        assert turn.sent == pytest.approx(ready + thinks[turn.society, turn.round, turn.agent])
        assert turn.sent < turn.first_token <= turn.end <= ends[turn.society, turn.round]
    for record in played.rounds:
        assert 0 < record.first_token_seconds <= record.seconds


@pytest.mark.parametrize("style", HistoryStyle)
def test_later_rounds_find_their_private_histories(style: HistoryStyle) -> None:
    [spec] = draw_societies(replace(WORKLOAD, societies=1, style=style, stragglers=0.0, output=Span(32, 32)))
    run = play_rounds(make_engine(), [spec], segments=False)
    histories = {agent.name: agent.history_tokens for agent in spec.agents}
    for turn in run.turns:
        if turn.round == 0:
            assert turn.cached_tokens == 0
        elif style is HistoryStyle.rolling:
            assert histories[turn.agent] - 16 < (turn.cached_tokens or 0) <= histories[turn.agent] + 16 * turn.round
        else:
            before = next(t for t in run.turns if (t.agent, t.round) == (turn.agent, turn.round - 1))
            assert before.prompt_tokens + 32 - 17 <= (turn.cached_tokens or 0)
    summary = run.summary()
    assert summary["computed_tokens"] == summary["prompt_tokens"] - summary["cached_tokens"]


def test_agents_of_equal_prompts_do_not_read_the_same_from_one_another() -> None:
    """A simulated device says by place alone: taken at its word, four agents would have one output to share."""
    workload = replace(WORKLOAD, societies=1, stragglers=0, history=Span(64, 64), output=Span(16, 16), order="same")
    asked = []
    engine = make_engine()
    add = engine.add
    engine.add = lambda request: (asked.append(request), add(request))[1]  # type: ignore[method-assign,assignment,func-returns-value]
    play_rounds(engine, draw_societies(workload))
    for request in asked:
        places = [0]
        for segment in request.segments:
            places.append(places[-1] + segment.tokens)
        assert places[-1] == request.prompt_length
        shared = {
            tuple(request.tokens[a:b].tolist())
            for segment, a, b in zip(request.segments, places, places[1:], strict=False)
            if segment.kind == "shared"
        }
        assert len(shared) == 4


def test_a_society_that_outgrows_the_context_fails_and_the_other_goes_on() -> None:
    small, large = SPECS[0], replace(SPECS[1], style=HistoryStyle.append)
    room = small.longest_context + 1
    assert large.longest_context > room
    engine = make_engine(max_context=room)
    run = play_rounds(engine, [small, large])
    assert run.failures == {large.id: "refused: context_length_exceeded"}
    assert [record.round for record in run.rounds if record.society == small.id] == [0, 1, 2]
    assert not engine.has_work and engine.cache.pool.num_active == 0


def test_most_agents_is_the_last_number_within_the_limit() -> None:
    workload = replace(WORKLOAD, societies=1, stragglers=0.0)
    seconds: dict[int, float] = {}

    def note(agents: int, run: RoundsRun) -> None:
        seconds[agents] = run.round_percentile(50, 1)

    make = partial(make_engine, check=False)
    for slo in (1.0, 1.5):
        found = most_agents(make, workload, slo, 50, most=16, on_run=note)
        assert 0 < found < 16 and seconds[found] <= slo < seconds[found + 1]
    assert most_agents(make, workload, 0.01) == 0
    assert most_agents(make, replace(workload, rounds=1), 100.0, most=6) == 6
    first_tokens = most_agents(make, workload, 1.0, 50, until="first_token", most=16)
    assert first_tokens > most_agents(make, workload, 1.0, 50, most=16)


@given(st.integers(0, 40), st.integers(1, 30))
def test_the_search_finds_the_last_number_that_holds(last: int, most: int) -> None:
    tried: list[int] = []

    def holds(number: int) -> bool:
        tried.append(number)
        return number <= last

    assert most_holding(holds, most) == min(last, most)
    assert len(tried) == len(set(tried)) and all(1 <= number <= most for number in tried)


def test_a_report_reads_well_even_of_nothing(played: RoundsRun) -> None:
    console = Console(width=100, record=True)
    console.print(render(played, title="two societies"), render(RoundsRun(failures={"a": "refused"})))
    text = console.export_text()
    assert "6, 24 requests" in text and "as prefixes" in text
    assert "failed: refused" in text
