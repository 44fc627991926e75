"""A whole Llama-family forward pass on the CPU as one native call, `kvarn::llama_forward`.

One op at a time costs some 10 us of Python and torch for each, 240 times a step; here a step is one call without any
of it, which also leaves Python's lock to other threads. It computes what the same ops one by one compute, bit for bit.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

PHASES: Final = (
    "qkv", "rotation, cache write", "attention", "output", "gate, up", "down", "head", "norms", "activation",
    "quantising",
)  # fmt: skip
"""What a forward pass spends its time on; norms and activation include the quantising of what they give."""


@dataclass(frozen=True)
class LinearWeights:
    """A laid-out linear layer: `ops.pack_linear` (16 bits), `quantized.pack_int8` or `pack_int4`."""

    bits: int
    packed: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int

    def fields(self) -> list[int]:
        return [self.bits, self.packed.data_ptr(), self.packed[0].nbytes, _pointer(self.bias),
                self.in_features, self.out_features]  # fmt: skip


@dataclass(frozen=True)
class LlamaLayer:
    """One layer; norms are bfloat16. `window`: positions attention looks back, 0 for all."""

    input_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    mlp_norm: Tensor
    window: int
    qkv: LinearWeights
    output: LinearWeights
    gate_up: LinearWeights
    down: LinearWeights


class NativeLlama:
    """The forward pass of a model in bfloat16 activations. Keeps its tensors alive; calls may not overlap."""

    def __init__(
        self,
        layers: Sequence[LlamaLayer],
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        scale: float,
        cos_sin: Tensor,
        final_norm: Tensor,
        head: LinearWeights,
    ) -> None:
        fields = [
            len(layers), head.in_features, heads, kv_heads, head_dim, layers[0].down.in_features, head.out_features,
            _bits(eps), _bits(scale), cos_sin.data_ptr(), *cos_sin.shape, final_norm.data_ptr(), *head.fields(),
        ]  # fmt: skip
        for layer in layers:
            norms = (layer.input_norm, layer.query_norm, layer.key_norm, layer.mlp_norm)
            fields += [*(_pointer(norm) for norm in norms), layer.window]
            for weights in (layer.qkv, layer.output, layer.gate_up, layer.down):
                fields += weights.fields()
        self._description = torch.tensor(fields, dtype=torch.int64)
        self._kept = (tuple(layers), cos_sin, final_norm, head)
        self.seconds: Tensor | None = None
        """[phases] float64, to have the time of each of `PHASES` added to it."""
        self._forward = torch.ops.kvarn.llama_forward.default

    def __call__(
        self,
        inputs: Tensor,
        positions: Tensor,
        slots: Tensor,
        block_tables: Tensor,
        kv_slots: Tensor,
        query_starts: Tensor,
        logit_rows: Tensor,
        pages: Tensor,
        slot_positions: Tensor,
        views: Sequence[Tensor] = (),
    ) -> Tensor:
        """Writes keys and values into `pages` and returns logits [R, vocabulary] float32.

        `inputs` [T, hidden] are the embeddings of the tokens; the rest as in `kvarn.models.spec.ForwardBatch` and
        `KVMemory`, `logit_rows` rising; `views` are the five tensors of `SharedViews`, or none.
        Raises RuntimeError for what does not fit the model.
        """
        return self._forward(  # type: ignore[no-any-return]
            self._description, inputs, positions, slots, block_tables, kv_slots, query_starts, logit_rows, pages,
            slot_positions, self.seconds, *views,
        )  # fmt: skip


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _bits(value: float) -> int:
    return int(struct.unpack("q", struct.pack("d", value))[0])
