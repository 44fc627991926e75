"""Shapes against what is published of the models, and against themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvarn.errors import KvarnError
from kvarn.hardware.models import ModelShape, known_models, load_model_shape


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("llama3-8b", 8_030_261_248),
        ("qwen2-7b", 7_615_616_512),
        ("qwen2.5-14b", 14_770_033_664),
        ("qwen2.5-32b", 32_763_876_352),
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("llama3.1-70b", 70_553_706_496),
    ],
)
def test_weights_are_as_many_as_published(name: str, weights: int) -> None:
    assert load_model_shape(name).num_weights == weights


@pytest.mark.parametrize(
    ("name", "kib"),
    [("llama3-8b", 128), ("qwen2-7b", 56), ("qwen2.5-14b", 192), ("qwen2.5-32b", 256), ("qwen2.5-0.5b", 12)],
)
def test_kv_bytes_of_a_token_in_bfloat16(name: str, kib: int) -> None:
    assert load_model_shape(name).kv_bytes_per_token() == kib * 1024


def test_linear_operations_are_two_a_weight() -> None:
    for shape in known_models().values():
        embeddings = 0 if shape.tied_embeddings else shape.head_weights
        assert shape.linear_flops + shape.head_flops == pytest.approx(2 * (shape.num_weights - embeddings), rel=1e-3)


def test_a_folder_with_a_config_is_a_shape(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = load_model_shape(str(tmp_path))
    assert shape == ModelShape(tmp_path.name, *list(vars(load_model_shape("smollm2")).values())[1:])
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KvarnError, match="hidden_size"):
        load_model_shape(str(tmp_path))


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(KvarnError, match="llama3-8b, "):
        load_model_shape("llama9")
