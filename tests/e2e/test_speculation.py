"""Speculation on the real model in fp32: tokens, probabilities and reasons to stop are those without it."""

from __future__ import annotations

from typing import Any

import pytest

from kvarn.models.tokenizer import Tokenizer
from kvarn.serving.offline import Generation, OfflineEngine
from kvarn.serving.sampling.params import Grammar, SamplingParams

STORY = "The lighthouse keeper counted the ships that passed in the night, and wrote each name into a heavy book. "
CODE = "def area(width, height):\n    return width * height\n\n\ndef volume(width, height, depth):\n    return width * "
REPEAT = f"<|im_start|>user\nRepeat this text word for word: {STORY}<|im_end|>\n<|im_start|>assistant\n"
ASKS: list[tuple[str, dict[str, Any]]] = [
    (REPEAT, {"temperature": 0.0}),
    (STORY * 3, {"temperature": 0.0, "ignore_eos": True}),
    (CODE, {"temperature": 0.0, "logprobs": 3}),
    (REPEAT, {"temperature": 0.7, "seed": 1}),
    (STORY * 3, {"temperature": 0.8, "seed": 2, "top_p": 0.9, "ignore_eos": True}),
    (CODE, {"temperature": 1.0, "seed": 3, "top_k": 20, "logprobs": 2}),
    (STORY * 3, {"temperature": 0.5, "seed": 4, "repetition_penalty": 1.05, "frequency_penalty": 0.1}),
    (REPEAT, {"temperature": 0.0, "presence_penalty": 0.3, "logit_bias": {3: 2.0, 28: -1.0}}),
    (REPEAT, {"temperature": 0.6, "seed": 5, "min_tokens": 30}),
    (STORY * 3, {"temperature": 0.0, "stop_token_ids": (30,)}),
    (
        'Two people as JSON: [{"name": "Ann", "age": 3}, {"name": "Bob", "age": 4}]\nAgain: ',
        {
            "temperature": 0.0,
            "grammar": Grammar("regex", r'\[\{"name": "[A-Z][a-z]{1,9}", "age": [0-9]{1,2}\}, \{"name": "Bob".{5,40}'),
        },
    ),
]


def _generate(speculation: str, **settings: Any) -> tuple[list[Generation], OfflineEngine]:
    engine = OfflineEngine.load(
        "smollm2", precision="float32", kv_memory_bytes=128 * 2**20, speculation=speculation, **settings
    )
    engine.engine._check = True
    tokenizer = Tokenizer.load(engine.folder)
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text, _ in ASKS]
    return engine.generate(prompts, [SamplingParams(max_tokens=48, **asked) for _, asked in ASKS]), engine


@pytest.fixture(scope="module")
def plain() -> list[Generation]:
    return _generate("off")[0]


def test_drafts_change_nothing_but_the_number_of_steps(plain: list[Generation]):
    drafted, engine = _generate("ngram", draft_tokens=6)
    for ask, expected, got in zip(ASKS, plain, drafted, strict=True):
        assert got.token_ids == expected.token_ids, ask
        assert (got.finish_reason, got.error) == (expected.finish_reason, expected.error), ask
        assert len(got.logprobs) == len(expected.logprobs)
        for one, other in zip(got.logprobs, expected.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
    counters = engine.engine.counters
    assert 0 < counters.accepted_tokens < counters.drafted_tokens
    assert counters.accepted_tokens > 0.2 * counters.output_tokens


def test_drafts_in_a_pool_too_small_for_all(plain: list[Generation]):
    drafted, engine = _generate("ngram", block_size=4, max_running=4, token_budget=40, prefill_budget=9)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    assert engine.engine.counters.accepted_tokens > 0
