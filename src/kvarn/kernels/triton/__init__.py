"""The operators of `kvarn.kernels.ops` in Triton, for CUDA devices.

With TRITON_INTERPRET=1 Triton runs the same kernels on the CPU, slowly: that is how they are tested without a GPU.
"""

from __future__ import annotations

import importlib.util

import torch


def register(library: torch.library.Library) -> bool:
    """Register the kernels for CUDA tensors of `library`'s operators; False where there is no CUDA or no Triton."""
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    from kvarn.kernels import flashinfer
    from kvarn.kernels.triton import attention, linear, restore, rowwise, shared_attention

    library.impl("paged_attention", flashinfer.or_else(attention.paged_attention), "CUDA")
    for implementation in (
        shared_attention.shared_attention,
        rowwise.rms_norm,
        rowwise.add_rms_norm,
        rowwise.rope_and_cache,
        rowwise.write_cache,
        rowwise.silu_mul,
        restore.restore_blocks,
        linear.int_linear,
    ):
        library.impl(implementation.__name__, implementation, "CUDA")
    return True
