"""How close to the machine: decode against the time to read the weights, prefill against the peak of matrix products.

    python -m benchmarks.limits            about two minutes
    python -m benchmarks.limits --quick    does everything run?

Read bandwidth (the sum of a large array) and GEMM peaks (torch's own products in bf16, oneDNN's in int8) are measured
before and after every single run, since a shared machine's memory is twice as fast in one minute as in another; a
run's limit is the higher of its two neighbours. Decode at batch 1 reads every matrix once a token: the share is weight
bytes x tokens/s over the bandwidth. Prefill's share is operations a second (linear layers and causal attention) over
the peak of its arithmetic: int8 for int8 and int4. Results: `benchmarks/results/limits.*`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarks import machine, model, settings
from benchmarks.contenders import CONTENDERS, chosen
from benchmarks.engines import EngineProcess
from benchmarks.results import Results
from benchmarks.turns import take_turns
from benchmarks.work import BYTES, shape

from kvarn.bench.offline import Workload, measure

PRECISIONS = {"kvarn-bf16": "bfloat16", "kvarn-int8": "int8", "kvarn-int4": "int4"}
GEMM_SHAPES = ((2048, 2048, 2048), (1024, 4096, 1024), (512, 4096, 2048))
READ_BYTES = 256 * 2**20
LOOKS = 3
"""How often each limit is looked at, before and after every run; the best counts."""


def best_seconds(call: Callable[[], object], repeats: int) -> float:
    """Shortest of `repeats` calls, after one that warms up."""
    call()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


@torch.inference_mode()
def machine_limits(threads: int, repeats: int) -> dict[str, float]:
    """Bytes a second read by all threads; operations a second in bf16 and in int8."""
    torch.set_num_threads(threads)
    found = {"read": READ_BYTES / best_seconds(torch.ones(READ_BYTES // 4).sum, repeats), "bf16": 0.0, "int8": 0.0}
    for m, n, k in GEMM_SHAPES:
        operations = 2 * m * n * k
        a, b = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
        products = {"bf16": lambda a=a, b=b: torch.nn.functional.linear(a, b)}
        a8, b8 = torch.randint(-9, 9, (m, k), dtype=torch.int8), torch.randint(-9, 9, (k, n), dtype=torch.int8)
        products["int8"] = lambda a=a8, b=b8: torch._int_mm(a, b)
        for name, product in products.items():
            found[name] = max(found[name], operations / best_seconds(product, repeats))
    return found


def higher(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """The higher figure of each kind."""
    return {name: max(value, other[name]) for name, value in one.items()}


def run_session(name: str, workload: Workload, arguments: argparse.Namespace) -> dict[str, Any]:
    """One precision of ours: {"about", "load_seconds", "readings"}; a reading has its runs' limits."""
    seen: list[dict[str, float]] = []

    def look_at_machine() -> None:
        machine.wait_until_quiet(arguments.patience)
        seen.append(machine_limits(arguments.threads, LOOKS))

    with EngineProcess(f"limits-{name}", CONTENDERS[name], arguments.threads, arguments.limit) as engine:
        session = engine.load()
        readings = measure(engine.generate, workload, before_run=look_at_machine)
        look_at_machine()
        foreign, limits = iter(engine.foreign[1:]), map(higher, seen, seen[1:])
        rows = [
            {
                **one.to_json(),
                "foreign_cores": [round(next(foreign), 3) for _ in one.repeats],
                "limits": [next(limits) for _ in one.repeats],
            }
            for one in readings
        ]
        return {**session, "readings": rows}


def main() -> None:
    arguments = settings.parse(settings.side_by_side(__doc__, rounds=1, repeats=7, limit=400.0))
    workload = Workload(batches=(1,), input_tokens=32, output_tokens=128, repeats=arguments.repeats)
    if arguments.quick:
        workload = Workload(batches=(1,), input_tokens=32, output_tokens=8, prefills=(128,), repeats=1)
    names = chosen(arguments.only, {name: CONTENDERS[name] for name in PRECISIONS})
    conditions = {
        "model": model.NAME, "threads": arguments.threads, "rounds": arguments.rounds, "repeats": arguments.repeats,
        "prefills": workload.prefills, "input_tokens": workload.input_tokens, "output_tokens": workload.output_tokens,
    }  # fmt: skip
    results = Results("limits", conditions, merge=arguments.merge, quick=arguments.quick)
    form = shape()
    results.data |= {
        "weight_bytes": {name: form.weight_bytes(name) for name in BYTES},
        "prefill_operations": {str(tokens): form.prefill_operations(tokens) for tokens in workload.prefills},
    }

    def session(name: str, turn: int) -> dict[str, Any]:
        return {"precision": PRECISIONS[name], **run_session(name, workload, arguments)}

    take_turns(names, session, results, arguments)
    print(results.path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
