"""What a model computes in: the precision of its weights, and the dtype of everything else that follows from it."""

from __future__ import annotations

from typing import Final, Literal, get_args

import torch

from kvarn.errors import ModelError
from kvarn.kernels import ops

Precision = Literal["float32", "bfloat16", "int8", "int4"]
PrecisionChoice = Literal["auto", "float32", "bfloat16", "int8", "int4"]
_INTEGER_KERNELS: Final = frozenset({"avx512_bf16", "avx512_vnni"})


def choose_precision(wanted: PrecisionChoice, device: torch.device, *, has_int4_blocks: bool) -> Precision:
    """`wanted`, or for "auto" the fastest on this device that leaves the weights as their file has them.

    int4 for 4-bit files where the processor multiplies small integers, else bfloat16 where it multiplies those, else
    float32. ModelError for a name that is none.
    """
    if wanted == "auto":
        if device.type == "cpu" and has_int4_blocks and ops.native_kernels() in _INTEGER_KERNELS:
            return "int4"
        fast = device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return "bfloat16" if fast else "float32"
    if wanted not in get_args(Precision):
        raise ModelError(f"precision is {wanted!r}; expected {', '.join(get_args(PrecisionChoice))}")
    return wanted


def compute_dtype(precision: Precision) -> torch.dtype:
    """dtype of activations, norms and embeddings, and of the KV cache unless it is quantised."""
    return torch.float32 if precision == "float32" else torch.bfloat16


def weight_bytes(precision: Precision) -> float:
    """Bytes a weight of a linear layer takes."""
    return {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.625}[precision]
