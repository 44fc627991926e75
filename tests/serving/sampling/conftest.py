"""Grammars over the bundled model's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvarn.serving.sampling.grammar import GrammarFactory

from .making import EOS

TOKENIZER_SIZE = 49152


@pytest.fixture(scope="session")
def tokenizer_path(model_folder: Path) -> Path:
    return model_folder / "tokenizer.json"


@pytest.fixture(scope="session")
def grammars(tokenizer_path: Path) -> GrammarFactory:
    """For logits wider than the tokenizer, as with padded embeddings."""
    return GrammarFactory(tokenizer_path, EOS, TOKENIZER_SIZE + 128)
