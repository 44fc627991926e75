"""Compiles the Triton kernels as for a GPU, without one: prints a line of JSON for each kernel and architecture.

    python -m tests.kernels.compile_triton 80 90

Run in a process of its own: with TRITON_INTERPRET=1 nothing would be compiled. The calls are those of the real
functions, on CPU tensors; they stop before the launch.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from kvarn.kernels import quantized
from kvarn.kernels.triton import attention, linear, restore, rowwise, shared_attention


class NoDriver:
    """What Triton asks of a GPU before it compiles."""

    def __init__(self, architecture: int) -> None:
        self._target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


def report(architecture: int) -> None:
    triton.runtime.driver.set_active(NoDriver(architecture))
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> None:
        compiled = launch(self, *args, **kwargs | {"warmup": True})
        print(
            json.dumps({
                "kernel": self.fn.__name__, "architecture": architecture, "shared_bytes": compiled.metadata.shared,
                "machine_code_bytes": len(compiled.asm["cubin"]),
            }), flush=True,
        )  # fmt: skip

    JITFunction.run = compile_only
    try:
        launch_all(torch.bfloat16)
        launch_attention(torch.bfloat16, torch.uint8)
        launch_attention(torch.float32, torch.float32)
    finally:
        JITFunction.run = launch


def empty_cache(dtype: torch.dtype) -> torch.Tensor:
    """16 blocks of 16 slots of 8 heads of 128; an int8 cache for uint8."""
    shape = (16, 2, 8, 16 * 132) if dtype == torch.uint8 else (16, 2, 8, 16, 128)
    return torch.empty(shape, dtype=dtype)


def launch_attention(dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    """Decode over several shares, then a prompt with everything that attention can do. Llama-3-8B's shapes."""
    heads, dim, tokens = 32, 128, 512
    kv = empty_cache(kv_dtype)
    positions, rows = torch.empty(16, 16, dtype=torch.int32), torch.empty(tokens, dtype=torch.int32)
    query = torch.empty(tokens, heads, dim, dtype=dtype)
    for sequences, options in ((tokens, {}), (1, {"window": 64, "softcap": 20.0, "sinks": torch.empty(heads)})):
        count = 2 if not options else tokens
        few = min(sequences, count)
        tables, slots = torch.empty(few, 512, dtype=torch.int32), torch.empty(few, dtype=torch.int32)
        starts = torch.empty(few + 1, dtype=torch.int32)
        own = (query[:count], kv, positions, tables, slots, starts, rows[:count])
        attention.paged_attention(*own, 0.1, **options)
        if not options:  # the parts of decoding, and what joins them
            views = (tables, slots, starts, torch.zeros_like(rows[:count]), rows[:count], torch.empty(100, dim))
            for sinks in (None, torch.empty(heads)):
                shared_attention.shared_attention(*own, *views, 0.1, sinks=sinks)


def launch_all(dtype: torch.dtype) -> None:
    launch_attention(dtype, dtype)
    kv_heads, dim, tokens = 8, 128, 512
    x, rows = torch.empty(tokens, 4096, dtype=dtype), torch.empty(tokens, dtype=torch.int32)
    query, key = torch.empty(tokens, 32, dim, dtype=dtype), torch.empty(tokens, kv_heads, dim, dtype=dtype)
    rowwise.rms_norm(x, x[0], 1e-5)
    rowwise.add_rms_norm(x, x, x[0], 1e-5)
    rowwise.silu_mul(x)
    for kv_dtype in (dtype, torch.uint8):
        kv = empty_cache(kv_dtype)
        rowwise.rope_and_cache(query, key, key, torch.empty(100, dim), rows, kv, rows)
        rowwise.write_cache(key, key, kv, rows)
        master, pages = empty_cache(dtype)[:, None], kv[:, None]
        restore.restore_blocks(master, master, rows, rows, rows, torch.empty(100, dim), pages)
    weight = torch.zeros(64, 4096)
    for bits, packed in ((8, quantized.pack_int8(weight)), (4, quantized.pack_int4(quantized.quantize_int4(weight)))):
        for count in (64, 65):
            linear.int_linear(x[:count], packed, None, 64, bits)


if __name__ == "__main__":
    for architecture in sys.argv[1:]:
        report(int(architecture))
