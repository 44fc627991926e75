"""What the model asks of a machine: bytes of its matrices by precision, operations of a prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass

from benchmarks import model

BYTES = {"bfloat16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 32}
"""Bytes a weight. int4: two 16-bit numbers (scale and least value) for each block of 32."""
HEAD_BYTES = BYTES | {"int4": 1.0}
"""Bytes a weight of the product over the vocabulary, which 4-bit models keep in 8 bits, as the bundled file does."""


@dataclass(frozen=True)
class Shape:
    """A Llama-family model, sizes in elements."""

    hidden: int
    layers: int
    layer_weights: int
    """In the matrices of one layer."""
    head_weights: int
    """Of the product over the vocabulary; the embedding is the same matrix."""

    def weight_bytes(self, precision: str) -> float:
        """All matrices once, as stored in `precision`: what one decode step reads at least."""
        return self.layers * self.layer_weights * BYTES[precision] + self.head_weights * HEAD_BYTES[precision]

    def prefill_operations(self, tokens: int) -> float:
        """Multiplications and additions of one prompt: linear layers, causal attention, one row of the head."""
        linear = 2 * self.layers * self.layer_weights * tokens
        attention = 4 * self.layers * self.hidden * tokens * (tokens + 1) / 2
        return linear + attention + 2 * self.head_weights


def shape() -> Shape:
    """Of the benchmarks' model."""
    config = json.loads((model.hf_folder() / "config.json").read_text())
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    width = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    layer = hidden * (query + 2 * key) + query * hidden + 3 * hidden * middle
    return Shape(query, config["num_hidden_layers"], layer, config["vocab_size"] * hidden)
