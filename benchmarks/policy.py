"""What a decision of the streaming policy costs, by how many requests there are: milliseconds.

    python -m benchmarks.policy

Under what load, and what looks and steps are: kvarn.reproduce.tokenflow.policy_cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvarn.reproduce.tokenflow.policy_cost import time_decisions

COUNTS = (400, 2000, 10_000)
SECONDS = 20.0
"""Measured time of each."""


def _figures(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    middle, high = np.percentile(seconds, [50, 99]) * 1e3
    return f"{np.mean(seconds) * 1e3:6.2f} mean {middle:6.2f} P50 {high:6.2f} P99 ({len(seconds)})"


def main() -> None:
    for count in COUNTS:
        timed = time_decisions(count, SECONDS)
        for what, seconds in (("looks", timed.looks), ("steps", timed.steps), ("all", timed.looks + timed.steps)):
            print(f"{count:6d} requests, {what:5s}  {_figures(seconds)}", flush=True)


if __name__ == "__main__":
    main()
