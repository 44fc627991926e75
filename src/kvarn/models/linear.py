"""`PackedLinear`: x @ weight.T + bias with the weight laid out once for the matrix kernels of this CPU.

oneDNN otherwise re-orders the weight in every call. Packed, a bf16 product of SmolLM2's shapes takes half the time at 1
to 4 rows, 0.75 of it at 16, and never more (one core, measured). Elsewhere (GPU, builds without oneDNN) it is plain
`linear`.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch.nn.functional import linear

_BATCH_HINT: Final = 32
"""Rows that the layout is chosen for. bf16 is the same for 1, 32 and 512; fp32 at 4 rows takes twice as long for 1."""


class PackedLinear:
    """A linear layer without autograd. Keeps no reference to `weight` when it packs it.

    weight [out, in] float32 or bfloat16; bias [out] or None. Calling takes [rows, in] and gives [rows, out].
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        self._packed = _can_pack(weight.device.type, weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _BATCH_HINT) if self._packed else weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._packed:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return result
        return linear(x, self._weight, self._bias)


@functools.cache
def _can_pack(device: str, dtype: torch.dtype) -> bool:
    if device != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
