"""A small random model that reads and writes the real model's tokens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import transformers

from kvarn.models.sources import resolve
from tests.models.tiny import SIZES, save_model


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    sizes = {**SIZES, "vocab_size": 49152, "max_position_embeddings": 2048}
    save_model(transformers.LlamaConfig(**sizes), folder)
    source = resolve("smollm2").folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of models and certificates."""
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path))
    return tmp_path
