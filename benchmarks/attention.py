"""Keys and values that decode attention reads in a second: `python -m benchmarks.attention [--json] [--quick]`.

SmolLM2-135M's shape, all of a pool's layers one after another, as a step reads them, so that the caches do not hold
them. Beside each other in one run: a bfloat16 and an int8 cache, torch's own attention over keys and values that lie
in order in bfloat16 (no blocks to look up), and the sum of a large tensor as the speed at which memory is read.
Each figure is the best of its repeats; GB/s count the bytes of the cache that is read.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks import machine

from kvarn.kernels import ops
from kvarn.models.spec import ModelSpec
from kvarn.serving.executors.torch_executor import allocate_kv

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 9, 3, 64, 16
CASES = ((1, 190), (8, 190), (32, 190), (64, 190), (8, 4096), (8, 8192))
POOL_BYTES = 128 * 2**20  # of a bfloat16 pool: more than caches hold


def best_seconds(calls: list[Callable[[], Any]], budget: float) -> float:
    """The shortest of the calls, taken in turn for `budget` seconds and once each at least."""
    for call in calls:
        call()
    best, end = float("inf"), time.perf_counter() + budget
    while time.perf_counter() < end:
        for call in calls:
            started = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - started)
    return best


def paged(batch: int, context: int, layers: int, dtype: torch.dtype) -> list[Callable[[], Any]]:
    """Our attention of one row a sequence over each layer of a pool whose blocks lie in random order."""
    spec = ModelSpec(
        "shape", "", layers, 576, HEADS, KV_HEADS, HEAD_DIM, 1, context, frozenset(), torch.bfloat16, "bfloat16"
    )
    width = -(-context // BLOCK)
    kv = allocate_kv(spec, batch * width, BLOCK, torch.device("cpu"), dtype)
    tables = torch.randperm(batch * width).int().view(batch, width)
    kv.slot_positions[tables.long()] = torch.arange(width * BLOCK, dtype=torch.int32).view(width, BLOCK)
    positions = torch.full((batch,), context - 1, dtype=torch.int32)
    slots = (tables[:, :, None] * BLOCK + torch.arange(BLOCK, dtype=torch.int32)).flatten()
    rows = torch.randn(len(slots), KV_HEADS, HEAD_DIM).bfloat16()
    for layer in range(layers):
        ops.write_cache(rows, rows, kv.layer(layer), slots)
    arguments = (
        kv.slot_positions, tables, positions + 1, torch.arange(batch + 1, dtype=torch.int32), positions, HEAD_DIM**-0.5,
    )  # fmt: skip
    query = torch.randn(batch, HEADS, HEAD_DIM).bfloat16()
    return [lambda pages=kv.layer(i): ops.paged_attention(query, pages, *arguments) for i in range(layers)]  # type: ignore[misc]


def in_order(batch: int, context: int, layers: int) -> list[Callable[[], Any]]:
    """torch's attention over the same amount of bfloat16 keys and values, contiguous."""
    attend = torch.nn.functional.scaled_dot_product_attention
    query = torch.randn(batch, HEADS, 1, HEAD_DIM).bfloat16()
    kv = torch.randn(1, 2, batch, KV_HEADS, context, HEAD_DIM).bfloat16().expand(layers, -1, -1, -1, -1, -1).clone()
    return [lambda pair=kv[i]: attend(query, pair[0], pair[1], enable_gqa=True) for i in range(layers)]  # type: ignore[misc]


def measure(budget: float, most_context: int) -> dict[str, Any]:
    memory = torch.ones(2**26).view(8, -1)
    read = memory[0].nbytes / best_seconds([lambda part=part: part.sum() for part in memory], budget) / 1e9  # type: ignore[misc]
    rows = []
    for batch, context in CASES:
        if context > most_context:
            continue
        tokens = batch * context * 2 * KV_HEADS
        layers = max(1, min(30, POOL_BYTES // (tokens * HEAD_DIM * 2)))
        rates = {
            "bfloat16": tokens * HEAD_DIM * 2 / best_seconds(paged(batch, context, layers, torch.bfloat16), budget),
            "int8": tokens * (HEAD_DIM + 4) / best_seconds(paged(batch, context, layers, torch.int8), budget),
            "torch": tokens * HEAD_DIM * 2 / best_seconds(in_order(batch, context, layers), budget),
        }
        rows.append({"batch": batch, "context": context} | {name: round(rate / 1e9, 2) for name, rate in rates.items()})
    return {"read_gb_per_second": round(read, 1), "decode_gb_per_second": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="short contexts and repeats: says that it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load = machine.ForeignLoad()
    with torch.inference_mode():
        figures = measure(0.02 if options.quick else 0.6, 1024 if options.quick else 8192)
    if options.json:
        conditions = {"kernels": ops.native_kernels(), "threads": options.threads, "torch": torch.__version__}
        result = {"benchmark": "attention", "machine": machine.describe(), "conditions": conditions}
        print(json.dumps(result | {"foreign_cores": round(load.cores(), 2)} | figures))
        return
    print(
        f"kernels: {ops.native_kernels()}, {options.threads} threads; memory read: {figures['read_gb_per_second']} GB/s"
    )
    print(f"{'batch':>5} {'context':>8} {'bfloat16':>9} {'int8':>7} {'torch':>7}  GB/s")
    for row in figures["decode_gb_per_second"]:
        print("{batch:5} {context:8} {bfloat16:9.1f} {int8:7.1f} {torch:7.1f}".format(**row))
    print(f"busy with other work meanwhile: {load.cores():.1f} cores")


if __name__ == "__main__":
    main()
