"""How fast the kernels are, native beside reference: `python -m benchmarks.kernels [--json] [--quick]`.

Shapes are SmolLM2-135M's (9 query heads, 3 kv heads of 64, blocks of 16 slots in random order). Decode attention is
given in GB/s of keys and values read, prefill in GFLOP/s of the causal half, dispatch as the time of an op with next
to no work. Each figure is the best of several repeats; `foreign_cores` says how much of the machine others used.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from benchmarks import machine

from kvarn.kernels import ops, reference

HEADS, KV_HEADS, HEAD_DIM, BLOCK, HIDDEN, MLP = 9, 3, 64, 16, 576, 1536


@dataclass(frozen=True)
class Figure:
    """`native` and `reference` in `unit`; higher is better but for "us"."""

    what: str
    dtype: str
    unit: str
    native: float
    reference: float


def best_seconds(call: Callable[[], Any], budget: float) -> float:
    """The shortest of the calls, in groups long enough to time, that fit into `budget` seconds."""
    call()
    started = time.perf_counter()
    call()
    once = max(time.perf_counter() - started, 1e-7)
    group = max(1, round(min(1e-3, budget / 4) / once))
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end:
        started = time.perf_counter()
        for _ in range(group):
            call()
        best = min(best, (time.perf_counter() - started) / group)
    return best


def attention_arguments(sequences: int, rows: int, context: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """`sequences` of `context` tokens each, the last `rows` of which are query rows."""
    width = (context + BLOCK - 1) // BLOCK
    tables = torch.randperm(sequences * width).int().view(sequences, width)
    slot_positions = torch.empty(sequences * width, BLOCK, dtype=torch.int32)
    slot_positions[tables.long()] = torch.arange(width * BLOCK, dtype=torch.int32).view(width, BLOCK)
    return (
        torch.randn(sequences * rows, HEADS, HEAD_DIM).to(dtype),
        torch.randn(sequences * width, 2, KV_HEADS, BLOCK, HEAD_DIM).to(dtype),
        slot_positions,
        tables,
        torch.full((sequences,), context, dtype=torch.int32),
        torch.arange(0, sequences * rows + 1, rows, dtype=torch.int32),
        torch.arange(context - rows, context, dtype=torch.int32).repeat(sequences),
        HEAD_DIM**-0.5,
    )


def figures(dtype: torch.dtype, budget: float, largest: int) -> Iterator[Figure]:
    """All figures of one dtype; contexts above `largest` are left out."""
    name = str(dtype).removeprefix("torch.")

    def figure(what: str, unit: str, amount: float, call: str, *args: Any) -> Figure:
        seconds = [best_seconds(lambda f=getattr(where, call): f(*args), budget) for where in (ops, reference)]
        native, plain = (1e6 * s if unit == "us" else amount / s / 1e9 for s in seconds)
        return Figure(what, name, unit, native, plain)

    tiny, weight = torch.randn(1, 8).to(dtype), torch.randn(8).to(dtype)
    yield figure("dispatch of rms_norm", "us", 0, "rms_norm", tiny, weight, 1e-5)
    for batch in (1, 32):
        x, residual, norm = (torch.randn(n, HIDDEN).to(dtype) for n in (batch, batch, 1))
        yield figure(f"add_rms_norm, {batch} rows", "us", 0, "add_rms_norm", x, residual, norm[0], 1e-5)
        yield figure(f"silu_mul, {batch} rows", "us", 0, "silu_mul", torch.randn(batch, 2 * MLP).to(dtype))
        for context in (128, 1024, 4096):
            if context <= largest:
                kv_bytes = batch * context * 2 * KV_HEADS * HEAD_DIM * dtype.itemsize
                args = attention_arguments(batch, 1, context, dtype)
                yield figure(f"decode, batch {batch}, context {context}", "GB/s", kv_bytes, "paged_attention", *args)
    for rows in (512, 2048):
        if rows <= largest:
            operations = 2 * rows * rows * HEADS * HEAD_DIM
            args = attention_arguments(1, rows, rows, dtype)
            yield figure(f"prefill of {rows}", "GFLOP/s", operations, "paged_attention", *args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="short contexts and repeats: says that it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = machine.ForeignLoad()
    rows: list[Figure] = []
    if not options.json:
        print(f"kernels: {ops.native_kernels()}, {options.threads} threads")
        print(f"{'':34} {'dtype':9} {'unit':8} {'native':>9} {'reference':>9}")
    with torch.inference_mode():
        for dtype in (torch.bfloat16, torch.float32):
            for row in figures(dtype, 0.02 if options.quick else 0.4, 1024 if options.quick else 4096):
                rows.append(row)
                if not options.json:
                    print(
                        f"{row.what:34} {row.dtype:9} {row.unit:8} {row.native:9.1f} {row.reference:9.1f}", flush=True
                    )
    if options.json:
        conditions = {"kernels": ops.native_kernels(), "threads": options.threads, "torch": torch.__version__}
        result = {"benchmark": "kernels", "machine": machine.describe(), "conditions": conditions}
        print(json.dumps(result | {"foreign_cores": round(load.cores(), 2), "figures": [asdict(r) for r in rows]}))
    else:
        print(f"busy with other work meanwhile: {load.cores():.1f} cores")


if __name__ == "__main__":
    main()
