"""kvarn's greedy text is transformers' greedy text, token for token, in fp32, whatever the schedule."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvarn.serving.offline import OfflineEngine
from kvarn.serving.sampling.params import SamplingParams

TOKENS = 20

STORY = "The lighthouse keeper counted the ships that passed in the night, and wrote each name into a heavy book. "
TEXTS = [
    "Hello",
    "The capital of France is",
    "def fibonacci(n):\n",
    "1, 2, 3, 4, 5,",
    "Once upon a time, in a village by the sea,",
    "Q: What is the boiling point of water?\nA:",
    "こんにちは、世界。今日は",
    "Привет, как дела? Меня зовут",
    "😀😃😄 are called",
    "Ünïcödé ist überall: äöüß",
    "العربية لغة",
    "数学中,勾股定理说明",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
    "SELECT name FROM users WHERE",
    "\n\n\n",
    "a" * 50,
    "The quick brown fox jumps over the lazy dog. " * 8,
    STORY * 12,
    STORY * 30,
    STORY * 12 + "The last ship was called",
    STORY * 12 + "Nobody remembered",
    "In 1969,",
    "import torch\nimport numpy as np\n\nclass",
    "Dear Sir or Madam,",
]


@pytest.fixture(scope="module")
def expected(model_folder: Path) -> list[tuple[list[int], list[int]]]:
    """Prompt and continuation of each text, by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    pairs = []
    for text in TEXTS:
        prompt = tokenizer(text).input_ids
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1,
            )  # fmt: skip
        pairs.append((prompt, output[0, len(prompt) :].tolist()))
    assert len(pairs) >= 20
    return pairs


def _load(**settings: object) -> OfflineEngine:
    engine = OfflineEngine.load("smollm2", precision="float32", **settings)
    engine.engine._check = True
    return engine


@pytest.fixture(scope="module")
def engine() -> OfflineEngine:
    return _load(kv_memory_bytes=512 * 2**20)


PARAMS = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)


def _texts(engine: OfflineEngine, prompts: list[list[int]]) -> list[list[int]]:
    return [result.token_ids for result in engine.generate(prompts, PARAMS)]


def test_one_by_one(engine: OfflineEngine, expected: list[tuple[list[int], list[int]]]):
    for prompt, tokens in expected:
        assert _texts(engine, [prompt]) == [tokens]


def test_again_from_the_prefix_cache(engine: OfflineEngine, expected: list[tuple[list[int], list[int]]]):
    results = engine.generate([prompt for prompt, _ in expected], PARAMS)
    assert [result.token_ids for result in results] == [tokens for _, tokens in expected]
    assert sum(result.cached_tokens for result in results) > 1000


def test_mixed_batches_and_chunks_in_any_order(expected: list[tuple[list[int], list[int]]]):
    engine = _load(kv_memory_bytes=512 * 2**20, token_budget=50, max_running=9)
    shuffled = random.Random(1).sample(expected, len(expected))
    assert _texts(engine, [prompt for prompt, _ in shuffled]) == [tokens for _, tokens in shuffled]


def test_with_preemption(expected: list[tuple[list[int], list[int]]]):
    engine = _load(kv_memory_bytes=52 * 2**20, max_context=1024, block_size=4, share_prefixes=False)
    fitting = [pair for pair in expected if len(pair[0]) + TOKENS <= engine.engine.max_context]
    assert len(fitting) >= 20
    assert _texts(engine, [prompt for prompt, _ in fitting]) == [tokens for _, tokens in fitting]
    assert engine.engine.counters.preemptions > 0
    assert engine.engine.cache.pool.num_active == 0
