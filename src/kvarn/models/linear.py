"""`PackedLinear`: x @ weight.T + bias with the weight laid out once for the matrix kernels of this CPU.

bfloat16 runs on kvarn's own kernel where the processor multiplies it natively. It reads weights faster than oneDNN when
there are few rows, as in decoding, keeps up with it when there are many (`benchmarks/linear.py` measures both), and
gives a row the same bits whatever the batch. Elsewhere on a CPU oneDNN does the work on a layout of its own; without
one it re-orders the weight in every call. On other devices it is plain `linear`.
"""

from __future__ import annotations

import functools
from typing import Final, Literal

import torch
from torch.nn.functional import linear

from kvarn.kernels import ops

Layout = Literal["kvarn", "onednn", "plain"]
_BATCH_HINT: Final = 32
"""Rows that oneDNN's layout is chosen for. bf16 layouts do not depend on it; fp32's best overall is 32."""


class PackedLinear:
    """A linear layer without autograd. Keeps no reference to `weight` when it packs it.

    weight [out, in] float32 or bfloat16; bias [out] or None. Calling takes [rows, in] and gives [rows, out].
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        self.layout = _layout(weight.device.type, weight.dtype)
        match self.layout:
            case "kvarn":
                self._weight = ops.pack_linear(weight)
            case "onednn":
                self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH_HINT)
            case "plain":
                self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        match self.layout:
            case "kvarn":
                return ops.packed_linear(x, self._weight, self._bias, self.out_features)
            case "onednn":
                result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
                return result
            case "plain":
                return linear(x, self._weight, self._bias)


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
