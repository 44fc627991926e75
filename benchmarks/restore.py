"""Restoring mirrors into the pool, dense beside fused: `python -m benchmarks.restore [--json] [--quick]`.

What is measured: `kvarn.bench.restores`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch
from benchmarks import machine

from kvarn.bench.restores import MIRRORS, SHAPES, measured
from kvarn.kernels import ops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--quick", action="store_true", help="few repeats: says that it runs")
    parser.add_argument("--only", default="", help="shapes whose name has this")
    options = parser.parse_args()
    load = machine.ForeignLoad()
    rows = []
    if not options.json:
        print(f"{'shape':34} {'mirrors':>7} {'MiB':>7} {'dense':>8} {'materialised':>13} {'fused':>8} ms")
    with torch.inference_mode():
        for shape in SHAPES:
            for mirrors in MIRRORS if options.only in shape.name else ():
                rows.append(row := measured(shape, mirrors, 2 if options.quick else 25))
                if not options.json:
                    print(
                        f"{row.shape:34} {mirrors:7} {row.written_mib:7.0f} {row.dense_ms:8.1f} "
                        f"{row.materialised_ms:13.1f} {row.fused_ms:8.1f}  "
                        f"{row.over_dense:.2f}x {row.over_materialised:.2f}x "
                        f"{row.written_mib / row.fused_ms * 1.048576:.1f} GB/s written",
                        flush=True,
                    )
    if options.json:
        conditions = {"kernels": ops.native_kernels(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        result = {"benchmark": "restore", "machine": machine.describe(), "conditions": conditions}
        print(json.dumps(result | {"foreign_cores": round(load.cores(), 2), "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
