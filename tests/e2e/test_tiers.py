"""Tiers under the real model: the text is the same, in fp32, whatever was moved where."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from kvarn.serving.offline import OfflineEngine
from kvarn.serving.sampling.params import SamplingParams

PARAMS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SMALL_POOL = 24 * 2**20
"""546 tokens: three of the prompts with their texts."""


def load(**settings: object) -> OfflineEngine:
    engine = OfflineEngine.load("smollm2", precision="float32", max_context=512, block_size=8, **settings)
    engine.engine._check = True
    return engine


def prompts(count: int = 8, length: int = 150) -> list[list[int]]:
    rng = random.Random(5)
    shared = [rng.randrange(1000, 20_000) for _ in range(40)]
    return [shared + [rng.randrange(1000, 20_000) for _ in range(length - 40)] for _ in range(count)]


@pytest.fixture(scope="module")
def expected() -> Iterator[list[list[int]]]:
    engine = load(kv_memory_bytes=512 * 2**20)
    yield [result.token_ids for result in engine.generate(prompts(), PARAMS)]
    engine.close()


def test_texts_are_the_same_with_a_host_tier(expected):
    engine = load(kv_memory_bytes=SMALL_POOL, host_memory_bytes=512 * 2**20)
    for _ in range(2):
        assert [result.token_ids for result in engine.generate(prompts(), PARAMS)] == expected
        while engine.engine.settle():
            engine.engine.tiers.wait(0.1)
    assert engine.engine.counters.preemptions > 0 and engine.engine.counters.loads > 0
    assert engine.engine.cache.pool.num_active == 0
    engine.close()
