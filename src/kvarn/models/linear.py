"""Linear layers in every precision, and reading them from a model's files.

`PackedLinear` is x @ weight.T + bias with the weight laid out once for the matrix kernels of this machine. bfloat16
runs on kvarn's own kernel where the processor multiplies it natively. It reads weights faster than oneDNN when there
are few rows, as in decoding, keeps up with it when there are many (`benchmarks/linear.py` measures both), and gives a
row the same bits whatever the batch. Elsewhere on a CPU oneDNN does the work on a layout of its own; without one it
re-orders the weight in every call. On other devices it is plain `linear`. Weights of 8 and 4 bits run on kvarn's
kernels everywhere.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from torch.nn.functional import linear

from kvarn.errors import ModelError
from kvarn.kernels import ops
from kvarn.kernels.llama import LinearWeights
from kvarn.kernels.quantized import Int4Weight, pack_int4, pack_int8, quantize_int4
from kvarn.models.arena import Arena
from kvarn.models.embedding import Embedding
from kvarn.models.gguf_blocks import Int4Blocks
from kvarn.models.precision import Precision, compute_dtype
from kvarn.models.weights import Weights

Layout = Literal["kvarn", "int8", "int4", "onednn", "plain"]
_BATCH_HINT: Final = 32
"""Rows that oneDNN's layout is chosen for. bf16 layouts do not depend on it; fp32's best overall is 32."""


class PackedLinear:
    """A linear layer without autograd. Keeps no reference to `weight` when it packs it.

    weight     [out, in] float32 or bfloat16, or 4-bit codes with their scales; bias [out] or None
    int8       quantise the weight to 8 bits
    arena      where to keep the laid-out weight for kvarn's kernels
    float32    give sums as they are, not rounded to the input's dtype, where the kernel is kvarn's own

    Calling takes [rows, in] (bfloat16 when quantised) and gives [rows, out].
    """

    def __init__(
        self,
        weight: torch.Tensor | Int4Weight,
        bias: torch.Tensor | None = None,
        *,
        int8: bool = False,
        float32: bool = False,
        arena: Arena | None = None,
    ) -> None:
        self.bias, self.float32 = bias, float32
        keep = arena.keep if arena else lambda tensor: tensor
        if isinstance(weight, Int4Weight):
            self.layout: Layout = "int4"
            self.out_features, self.in_features = weight.codes.shape
            self.weight = keep(pack_int4(weight))
            return
        self.out_features, self.in_features = weight.shape
        self.layout = "int8" if int8 else _layout(weight.device.type, weight.dtype)
        match self.layout:
            case "int8":
                self.weight = keep(pack_int8(weight))
            case "kvarn":
                self.weight = keep(ops.pack_linear(weight))
            case "onednn":
                self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH_HINT)
            case _:
                self.weight = weight

    @property
    def is_native(self) -> bool:
        """Whether this runs on kvarn's own CPU kernels."""
        return self.weight.device.type == "cpu" and self.layout in ("kvarn", "int8", "int4")

    def native(self) -> LinearWeights:
        """This layer as `kernels.llama` wants it; only if it `is_native`."""
        bits = {"kvarn": 16, "int8": 8, "int4": 4}[self.layout]
        return LinearWeights(bits, self.weight, self.bias, self.in_features, self.out_features)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        match self.layout:
            case "kvarn":
                return ops.packed_linear(x, self.weight, self.bias, self.out_features, self.float32)
            case "int8" | "int4":
                bits = 8 if self.layout == "int8" else 4
                return ops.int_linear(x, self.weight, self.bias, self.out_features, bits, self.float32)
            case "onednn":
                result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
                return result
            case "plain":
                return linear(x, self.weight, self.bias)


@functools.cache
def _layout(device: str, dtype: torch.dtype) -> Layout:
    if device != "cpu":
        return "plain"
    if dtype == torch.bfloat16 and ops.native_kernels() == "avx512_bf16":
        return "kvarn"
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "plain"
    if dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return "onednn"
    return "plain"


@dataclass(frozen=True, slots=True)
class LinearReader:
    """Reads a model's tensors onto `device` in the form its `precision` asks for."""

    weights: Weights
    blocks: Int4Blocks
    precision: Precision
    device: torch.device
    arena: Arena = field(default_factory=Arena)

    def __call__(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor in the dtype of activations. Raises ModelError when it is missing or not of `shape`."""
        return self.weights.get(name, shape).to(self.device, compute_dtype(self.precision))

    def embedding(self, name: str, shape: tuple[int, int]) -> Embedding:
        """A matrix of which single rows will be asked for. Raises ModelError as reading a tensor does."""
        dtype = compute_dtype(self.precision)
        on_host = self.device.type == "cpu"
        return Embedding(self.weights.mapped(name, shape) if on_host else self(name, shape), dtype)

    def linear(self, parts: list[tuple[str, int]], width: int) -> PackedLinear:
        """One layer out of several with the same input, stacked in order: `parts` gives each one's name and rows."""
        bias = self._bias(parts)
        if self.precision == "int4" and width % 32 == 0:
            stacked = zip(*(self._int4(f"{name}.weight", (rows, width)) for name, rows in parts), strict=True)
            return PackedLinear(
                Int4Weight(*(torch.cat(tensors).to(self.device) for tensors in stacked)), bias, arena=self.arena
            )
        quantised = self.precision in ("int8", "int4")
        weights = [self.weights.get(f"{name}.weight", (rows, width)) for name, rows in parts]
        dtype = torch.float32 if quantised else compute_dtype(self.precision)
        weight = torch.cat([each.to(self.device, dtype) for each in weights])
        return PackedLinear(weight, bias, int8=quantised, arena=self.arena)

    def head(self, name: str, shape: tuple[int, int]) -> PackedLinear:
        """The layer that gives logits: in float32 where possible, and of 8 bits in int4, which costs least there."""
        quantised = self.precision in ("int8", "int4")
        weight = self.weights.get(name, shape).to(self.device) if quantised else self(name, shape)
        return PackedLinear(weight, int8=quantised, float32=True, arena=self.arena)

    def _int4(self, name: str, shape: tuple[int, int]) -> Int4Weight:
        return self.blocks.get(name, shape) if name in self.blocks else quantize_int4(self.weights.get(name, shape))

    def _bias(self, parts: list[tuple[str, int]]) -> torch.Tensor | None:
        with_bias = [f"{name}.bias" in self.weights for name, _ in parts]
        if not any(with_bias):
            return None
        if not all(with_bias):
            raise ModelError(f"{self.weights.folder}: some of {[name for name, _ in parts]} have a bias, some do not")
        return torch.cat([self(f"{name}.bias", (rows,)) for name, rows in parts])
