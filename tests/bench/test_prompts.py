"""Prompts have exactly the length asked for and share exactly the prefixes the workload shares."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from kvarn.bench.prompts import PromptMaker, load_tokenizer, single_token_words
from kvarn.errors import KvarnError
from kvarn.simulation.workloads import RequestSpec


@given(st.integers(1, 300), st.lists(st.integers(0, 5), max_size=8), st.integers(1, 64), st.integers(0, 1000))
def test_token_prompts_have_their_length_and_stay_in_range(
    length: int, blocks: list[int], block_tokens: int, seed: int
) -> None:
    spec = RequestSpec(0.0, length, 1, prefix_ids=tuple(blocks), prefix_block_tokens=block_tokens)
    tokens = PromptMaker(seed=seed, tokens=(100, 200)).token_ids(spec, 0)
    assert len(tokens) == length
    assert all(100 <= token < 200 for token in tokens)


def test_equal_leading_ids_are_equal_prefixes_and_nothing_else_is_shared() -> None:
    maker = PromptMaker()
    one = maker.token_ids(RequestSpec(0.0, 30, 1, prefix_ids=(7, 8), prefix_block_tokens=10), 0)
    two = maker.token_ids(RequestSpec(0.0, 40, 1, prefix_ids=(7, 9), prefix_block_tokens=10), 1)
    assert one[:10] == two[:10]
    assert one[10] != two[10]
    assert one[20:30] != two[20:30]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer("smollm2")


def test_text_prompts_are_exact_for_the_models_own_tokenizer(tokenizer: Tokenizer) -> None:
    maker = PromptMaker(words=single_token_words(tokenizer))

    @given(st.integers(1, 400), st.integers(0, 99))
    @settings(max_examples=30, deadline=None)
    def lengths_hold(length: int, index: int) -> None:
        text = maker.text(RequestSpec(0.0, length, 1), index)
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) == length

    lengths_hold()


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(KvarnError, match="--tokenizer"):
        PromptMaker().text(RequestSpec(0.0, 5, 1), 0)
