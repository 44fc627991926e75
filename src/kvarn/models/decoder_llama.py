"""A fused decoder for the Llama family (Llama, SmolLM, Mistral, Qwen2, Qwen3), built straight from the weights.

In: config.json and safetensors. Out: a `Decoder`. No transformers model is instantiated: q, k and v are one matrix
product, so are gate and up, and norms, rotation, cache writes and attention are kvarn's kernels. What the weights are
multiplied with follows transformers' models exactly; a test holds the two together in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from kvarn.kernels import llama, ops
from kvarn.kernels.llama import NativeLlama
from kvarn.models.linear import LinearReader, PackedLinear
from kvarn.models.rope import SCALINGS, cos_sin_table, rope_parameters
from kvarn.models.spec import ForwardBatch, KVMemory, ModelSpec

ARCHITECTURES: Final = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})


def supports(config: dict[str, Any]) -> bool:
    """Whether this decoder computes what `config` (a config.json) describes."""
    return (
        (config.get("architectures") or [None])[0] in ARCHITECTURES
        and config.get("hidden_act", "silu") == "silu"
        and rope_parameters(config)["rope_type"] in SCALINGS
        and "quantization_config" not in config
    )


@dataclass(slots=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: PackedLinear
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    output: PackedLinear
    mlp_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear
    window: int
    """Positions that attention looks back, 0 for all."""


class LlamaDecoder:
    """See `kvarn.models.spec.Decoder`.

    spec     the model's shape; `spec.dtype` is what it computes in
    config   its config.json
    reader   its tensors in their precision, laid out one by one
    """

    capturable = True
    shares_views = True

    def __init__(self, spec: ModelSpec, config: dict[str, Any], reader: LinearReader) -> None:
        self.spec = spec
        self._eps = float(config["rms_norm_eps"])
        self._scale = spec.head_dim**-0.5
        self._embedding = reader.embedding("model.embed_tokens.weight", (spec.vocab_size, spec.hidden_size))
        self._layers = [self._layer(reader, index, config) for index in range(spec.num_layers)]
        self._norm = reader("model.norm.weight", (spec.hidden_size,))
        name = "model.embed_tokens.weight" if config.get("tie_word_embeddings", False) else "lm_head.weight"
        self._head = reader.head(name, (spec.vocab_size, spec.hidden_size))
        self.cos_sin = cos_sin_table(rope_parameters(config), spec.head_dim, spec.max_context).to(reader.device)
        self.native = self._native_forward()
        """The whole of `forward` as one call, where it can be."""

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVMemory) -> torch.Tensor:
        residual = self._embedding(batch.tokens)
        if self.native is not None:
            return self.native(
                residual, batch.positions, batch.slots, batch.block_tables, batch.kv_slots, batch.query_starts,
                batch.logit_rows, kv.pages, kv.slot_positions, batch.views.tensors() if batch.views else (),
            )  # fmt: skip
        hidden, residual = self._run(batch, kv, residual, len(self._layers))
        if not len(hidden):
            return hidden.new_empty(0, self.spec.vocab_size)
        return self._head(hidden)

    @torch.inference_mode()
    def encode(self, batch: ForwardBatch, kv: KVMemory) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the K and V of every row as `forward` does; returns keys before rotation and values, [L, T, Hkv, D]."""
        taken: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._run(batch, kv, self._embedding(batch.tokens), len(self._layers), lambda *pair: taken.append(pair))
        keys, values = zip(*taken, strict=True)
        return torch.stack(keys), torch.stack(values)

    @torch.inference_mode()
    def early_keys(self, batch: ForwardBatch, kv: KVMemory, layer: int) -> torch.Tensor:
        """Keys of one layer before rotation, [T, Hkv, D]; `kv` gets those of the layers before it and needs no more."""
        hidden, _ = self._run(batch, kv, self._embedding(batch.tokens), layer)
        return self._heads(self._layers[layer], hidden)[1]

    def _run(
        self,
        batch: ForwardBatch,
        kv: KVMemory,
        residual: torch.Tensor,
        layers: int,
        tap: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `layers` layers, one op at a time: normed for what comes next, and the residual stream.

        After the last layer of the model these are the rows that want logits. `tap` gets every layer's keys before
        rotation and values.
        """
        hidden = ops.rms_norm(residual, self._layers[0].input_norm, self._eps)
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers[:layers]):
            hidden = self._attention(layer, hidden, batch, kv, index, tap)
            if index == last:  # only rows that want logits go on
                hidden, residual = hidden[batch.logit_rows], residual[batch.logit_rows]
                if not len(hidden):
                    break
            hidden = ops.add_rms_norm(layer.output(hidden), residual, layer.mlp_norm, self._eps)
            hidden = layer.down(ops.silu_mul(layer.gate_up(hidden)))
            next_norm = self._norm if index == last else self._layers[index + 1].input_norm
            hidden = ops.add_rms_norm(hidden, residual, next_norm, self._eps)
        return hidden, residual

    def _attention(
        self,
        layer: _Layer,
        hidden: torch.Tensor,
        batch: ForwardBatch,
        kv: KVMemory,
        index: int,
        tap: Callable[[torch.Tensor, torch.Tensor], None] | None,
    ) -> torch.Tensor:
        """Attention before its output projection: [T, hidden] -> [T, heads * head_dim]."""
        query, key, value = self._heads(layer, hidden)
        if tap is not None:
            tap(key, value)
        pages = kv.layer(index)
        ops.rope_and_cache(query, key, value, self.cos_sin, batch.positions, pages, batch.slots)
        rows = (
            query, pages, kv.slot_positions, batch.block_tables, batch.kv_slots, batch.query_starts, batch.positions,
        )  # fmt: skip
        if batch.views is None:
            attended = ops.paged_attention(*rows, self._scale, layer.window)
        else:
            attended = ops.shared_attention(*rows, *batch.views.tensors(), self.cos_sin, self._scale, layer.window)
        return attended.flatten(1)

    def _heads(self, layer: _Layer, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of rows before rotation, [T, heads, D] each."""
        spec = self.spec
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        qkv = layer.qkv(hidden).view(-1, heads + 2 * kv_heads, spec.head_dim)
        query, key, value = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        if layer.query_norm is not None and layer.key_norm is not None:
            query = ops.rms_norm(query, layer.query_norm, self._eps)
            key = ops.rms_norm(key, layer.key_norm, self._eps)
        return query, key, value

    def _native_forward(self) -> NativeLlama | None:
        """All of `forward` as one native call; None where a layer is not on kvarn's own CPU kernels."""
        linears = [part for each in self._layers for part in (each.qkv, each.output, each.gate_up, each.down)]
        if ops.native_kernels() is None or not all(part.is_native for part in (*linears, self._head)):
            return None
        layers = [
            llama.LlamaLayer(
                each.input_norm, each.query_norm, each.key_norm, each.mlp_norm, each.window,
                each.qkv.native(), each.output.native(), each.gate_up.native(), each.down.native(),
            )
            for each in self._layers
        ]  # fmt: skip
        spec = self.spec
        return NativeLlama(
            layers, heads=spec.num_heads, kv_heads=spec.num_kv_heads, head_dim=spec.head_dim, eps=self._eps,
            scale=self._scale, cos_sin=self.cos_sin, final_norm=self._norm, head=self._head.native(),
        )  # fmt: skip

    def _layer(self, read: LinearReader, index: int, config: dict[str, Any]) -> _Layer:
        spec, prefix = self.spec, f"model.layers.{index}"
        hidden, width = spec.hidden_size, spec.head_dim
        rows = {"q": spec.num_heads * width, "k": spec.num_kv_heads * width, "v": spec.num_kv_heads * width}
        middle = int(config["intermediate_size"])
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        normed = config["architectures"][0] == "Qwen3ForCausalLM"
        return _Layer(
            input_norm=read(f"{prefix}.input_layernorm.weight", (hidden,)),
            qkv=read.linear([(f"{attention}.{part}_proj", out) for part, out in rows.items()], hidden),
            query_norm=read(f"{attention}.q_norm.weight", (width,)) if normed else None,
            key_norm=read(f"{attention}.k_norm.weight", (width,)) if normed else None,
            output=read.linear([(f"{attention}.o_proj", hidden)], rows["q"]),
            mlp_norm=read(f"{prefix}.post_attention_layernorm.weight", (hidden,)),
            gate_up=read.linear([(f"{mlp}.gate_proj", middle), (f"{mlp}.up_proj", middle)], hidden),
            down=read.linear([(f"{mlp}.down_proj", hidden)], middle),
            window=_window(index, config),
        )


def _window(index: int, config: dict[str, Any]) -> int:
    """Sliding window of a layer. Qwen has a switch and lists or counts the layers; Mistral slides all of them."""
    window = int(config.get("sliding_window") or 0)
    if not window or config["architectures"][0] == "LlamaForCausalLM":
        return 0
    if config.get("layer_types"):
        return window if config["layer_types"][index] == "sliding_attention" else 0
    if config["architectures"][0] == "MistralForCausalLM":
        return window
    return window if config.get("use_sliding_window") and index >= int(config.get("max_window_layers", 28)) else 0
