"""Shapes of decoder models as data, and what follows from a shape alone: weights, KV bytes, operations.

Covers the Llama family: grouped-query attention, gated feed-forward layers, RMSNorm. Per token and layer, the
linear layers take two operations a weight; attention takes four operations for each element of each head and each
key it looks at (two for the score, two for the weighted sum).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarn.errors import KvarnError, reason
from kvarn.hardware.tables import bundled_tables, pick, record

BYTES_PER_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.625}
"""By precision; int4 with its scales, as kvarn lays it out."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes in elements unless named otherwise."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied_embeddings: bool
    """Whether the output layer is the embedding table."""
    qkv_bias: bool
    max_context: int
    """Tokens of prompt + output that the model was made for."""

    @classmethod
    def from_config(cls, name: str, config: Mapping[str, Any]) -> ModelShape:
        """From the fields of a Hugging Face config.json; KvarnError naming a field that is missing."""
        try:
            heads = int(config["num_attention_heads"])
            return cls(
                name=name,
                layers=int(config["num_hidden_layers"]),
                hidden=int(config["hidden_size"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
                intermediate=int(config["intermediate_size"]),
                vocabulary=int(config["vocab_size"]),
                tied_embeddings=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=bool(config.get("attention_bias", config.get("model_type") == "qwen2")),
                max_context=int(config.get("max_position_embeddings", 8192)),
            )
        except KeyError as error:
            raise KvarnError(f"the config.json of {name} has no {error}; it is not of the Llama family") from error

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of all layers: what every token is multiplied with."""
        heads = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return self.layers * self.hidden * (heads + 3 * self.intermediate)

    @property
    def head_weights(self) -> int:
        """Weights of the output layer: what every sampled token is multiplied with."""
        return self.hidden * self.vocabulary

    @property
    def num_weights(self) -> int:
        """All of them, with embeddings, norms and biases."""
        tables = self.head_weights * (1 if self.tied_embeddings else 2)
        biases = self.layers * (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        return self.layer_weights + tables + biases + (2 * self.layers + 1) * self.hidden

    def kv_bytes_per_token(self, element_bytes: float = 2.0) -> float:
        """Bytes of keys and values of one token in all layers; elements of 2 bytes are bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes

    @property
    def linear_flops(self) -> float:
        """Operations of the layers' matrices for one token."""
        return 2.0 * self.layer_weights

    @property
    def head_flops(self) -> float:
        """Operations of the output layer for one sampled token."""
        return 2.0 * self.head_weights

    @property
    def attention_flops(self) -> float:
        """Operations of attention in all layers for one query token and one key token."""
        return 4.0 * self.layers * self.heads * self.head_dim


def known_models() -> dict[str, ModelShape]:
    """Every model of the data file by its name."""
    return {
        name: record(ModelShape, name, table, "models.toml") for name, table in bundled_tables("models.toml").items()
    }


def load_model_shape(name: str) -> ModelShape:
    """A shape by name (any case), or of a model folder or config.json; KvarnError that lists the known names."""
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json":
        try:
            config = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise KvarnError(f"cannot read {file}: {reason(error)}") from error
        if not isinstance(config, dict):
            raise KvarnError(f"{file} holds a {type(config).__name__}; expected a JSON object")
        return ModelShape.from_config(file.parent.name or "model", config)
    lower = {"smollm2": "smollm2-135m"}.get(name.lower(), name.lower())
    tables = bundled_tables("models.toml")
    return record(ModelShape, lower, pick(tables, lower, "model", "name a folder with a config.json"), "models.toml")
