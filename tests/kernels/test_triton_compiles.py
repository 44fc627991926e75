"""The Triton kernels compile to a GPU's machine code: what the interpreter accepts, the compiler may not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SHARED_BYTES = 99 * 1024
"""Shared memory of one program on the smallest of the GPUs with bfloat16 (compute capability 8.6)."""


def test_kernels_compile_for_a_gpu_and_fit_its_shared_memory(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_triton", "90"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    names = {kernel["kernel"] for kernel in kernels}
    rowwise = {"_norm", "_silu_mul", "_rope_and_cache", "_restore"}
    assert names == {"_attend", "_merge", "_turn_back", "_join", "_int_linear", "_widen"} | rowwise
    assert all(kernel["machine_code_bytes"] and kernel["shared_bytes"] <= SHARED_BYTES for kernel in kernels)
