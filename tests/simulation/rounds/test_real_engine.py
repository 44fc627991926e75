"""Societies on the real model in this process: what agents say is what the others read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvarn.bench.prompts import load_tokenizer
from kvarn.serving.offline import OfflineEngine
from kvarn.serving.sampling.params import SamplingParams
from kvarn.simulation.rounds.player import run_rounds
from kvarn.simulation.rounds.progress import SocietyRun
from kvarn.simulation.rounds.report import RoundsRun
from kvarn.simulation.rounds.scenarios import Span
from kvarn.simulation.rounds.texts import ScenarioTexts
from kvarn.simulation.rounds.workload import RoundWorkload, SocietySpec, draw_societies
from tests.conftest import MODEL

WORKLOAD = RoundWorkload(
    agents=2, rounds=2, history=Span(20, 30), output=Span(5, 7), task_tokens=16, stragglers=0.5, think_seconds=0.01
)
SPEC: SocietySpec = draw_societies(WORKLOAD)[0]


@pytest.fixture(scope="module")
def offline() -> Iterator[OfflineEngine]:
    engine = OfflineEngine.load(MODEL, precision="float32", kv_memory_bytes=64 * 2**20, speculation="off")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def texts() -> ScenarioTexts:
    words = load_tokenizer(MODEL)
    return ScenarioTexts(lambda text: words.encode(text, add_special_tokens=False).ids)


@pytest.fixture(scope="module")
def run(offline: OfflineEngine, texts: ScenarioTexts) -> RoundsRun:
    return run_rounds(offline.engine, [SPEC], texts, segments=False)


def test_agents_read_what_the_model_made_of_their_prompts(
    run: RoundsRun, offline: OfflineEngine, texts: ScenarioTexts
) -> None:
    said = {(turn.round, turn.agent): turn.said for turn in run.turns}
    assert len(said) == 4 and run.peak_blocks and not run.failures
    again = SocietyRun(SPEC, texts)
    asks = again.start()
    for number in range(2):
        params = [SamplingParams(temperature=0.0, max_tokens=ask.output_tokens, ignore_eos=True) for ask in asks]
        made = offline.generate([ask.prompt.tolist() for ask in asks], params)
        for ask, generation in zip(asks, made, strict=True):
            assert said[number, ask.hint.agent] == generation.token_ids
            following = again.answered(ask.agent, generation.token_ids)
        asks = following
    assert not asks
    for turn in run.turns:
        assert turn.ready <= turn.sent < turn.first_token <= turn.end


def test_an_answer_that_ends_early_is_read_without_its_end(
    run: RoundsRun, offline: OfflineEngine, texts: ScenarioTexts
) -> None:
    ends = frozenset({run.turns[0].said[3]})
    ended = run_rounds(offline.engine, [SPEC], texts, segments=False, eos_tokens=ends)
    assert len(ended.rounds) == 2
    before = {turn.agent: turn.said for turn in run.turns if turn.round == 0}
    for turn in ended.turns:
        assert not ends & set(turn.said)
        if turn.round == 0:
            full = before[turn.agent]
            length = next((place for place, token in enumerate(full) if token in ends), len(full))
            assert turn.said == full[:length]
