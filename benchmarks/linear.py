"""Linear layers in bf16: kvarn's packed kernel, oneDNN on its own packed layout, and torch's plain `linear`.

    python -m benchmarks.linear [--rounds 15]

Shapes are SmolLM2-135M's; each call meets a weight that is not in the caches, as in a forward pass. The three take
turns within a round. Results: `benchmarks/results/linear.json` and `.md`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from benchmarks import machine, render
from benchmarks.results import Results

from kvarn.kernels import ops

SHAPES = {"qkv": (960, 576), "output": (576, 576), "gate_up": (3072, 576), "down": (576, 1536), "head": (49152, 576)}
ROWS = (1, 4, 16, 32, 128, 512)
COLD_BYTES = 96 * 2**20
"""Weights of one shape together: several times the last-level cache."""


def calls_of(weights: list[torch.Tensor], x: torch.Tensor) -> dict[str, Callable[[], None]]:
    """For each implementation, one pass of `x` over all weights."""
    ours = [ops.pack_linear(weight) for weight in weights]
    onednn = [torch.ops.mkldnn._reorder_linear_weight(weight, 32) for weight in weights]
    out = weights[0].shape[0]

    def run_ours() -> None:
        for packed in ours:
            ops.packed_linear(x, packed, None, out)

    def run_onednn() -> None:
        for packed in onednn:
            torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    def run_plain() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    return {"kvarn": run_ours, "onednn": run_onednn, "plain": run_plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if ops.native_kernels() != "avx512_bf16":
        raise SystemExit(f"kernels are {ops.native_kernels()}; this compares the avx512_bf16 ones")
    results = Results("linear", {"repeats": arguments.rounds, "threads": torch.get_num_threads()}, merge=False)
    rows = results.data["rows"] = []
    with torch.inference_mode():
        for name, (out, width) in SHAPES.items():
            weights = [torch.randn(out, width).bfloat16() for _ in range(max(1, COLD_BYTES // (2 * out * width)))]
            for count in ROWS:
                calls = calls_of(weights, torch.randn(count, width).bfloat16())
                seconds: dict[str, list[float]] = {key: [] for key in calls}
                load = machine.ForeignLoad()
                for round_ in range(arguments.rounds + 1):
                    for key, call in calls.items():
                        started = time.perf_counter()
                        call()
                        if round_:  # the first warms up
                            seconds[key].append((time.perf_counter() - started) / len(weights))
                us = {key: 1e6 * median(values) for key, values in seconds.items()}
                rows.append({"layer": name, "rows": count, "us": us, "foreign_cores": load.cores()})
                print(f"{name:8} {count:4} rows  " + "  ".join(f"{key} {value:8.1f} us" for key, value in us.items()))
    results.save()
    render.render(results.path)


if __name__ == "__main__":
    main()
