"""What a decision of the streaming policy costs, by how many requests there are: milliseconds.

    python -m benchmarks.policy

A tenth of the requests fit the device at once, 250 at most; readers are so slow that four times as many are let in, and
the rest waits. A *look* is a decision that
makes a new plan, at most a few times a tick; a *step* is any other. Bringing a request back from the host costs what
looking its blocks up costs, whoever decides it; a look that brings many is counted with that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.serving.policies.protocol import Decision, Snapshot
from kvarn.serving.policies.streaming.policy import Streaming
from kvarn.serving.request import Request
from kvarn.serving.sampling.params import SamplingParams
from kvarn.simulation.assemble import simulated_engine

COUNTS = (400, 2000, 10_000)
SECONDS = 20.0
"""Measured time of each."""


class Timed:
    """The policy, with the time of each decision."""

    def __init__(self, policy: Streaming) -> None:
        self.policy = policy
        self.looks: list[float] = []
        self.steps: list[float] = []

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        looked_at, started = self.policy.looked_at, time.perf_counter()
        decision = self.policy.decide(snapshot, now)
        seconds = time.perf_counter() - started
        (self.steps if self.policy.looked_at == looked_at else self.looks).append(seconds)
        return decision


def crowded(count: int) -> Engine:
    """An engine on an H200 whose KV pool is short of so many requests of 200 to 600 tokens."""
    accelerator, model = load_accelerator("h200"), load_model_shape("llama3-8b")
    fitting = min(count // 10, 250)
    pool = fitting * 600 * model.kv_bytes_per_token(2)
    config = EngineConfig(
        policy="streaming", max_running=512, token_budget=8192, prefill_budget=8192, speculation="off",
        kv_memory_bytes=int(pool), host_memory_bytes=int(20 * pool),
    )  # fmt: skip
    engine = simulated_engine(config, accelerator, model)
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    rate = 1000.0 / fitting
    for i in range(count):
        prompt = np.arange(200, dtype=np.int32) * 7 % 1000 + i
        engine.add(Request.create(str(i), prompt, params, arrival=i * 1e-6, stream_rate=rate))
    return engine


def measure(count: int) -> dict[str, Any]:
    engine = crowded(count)
    assert isinstance(engine.policy, Streaming)
    timed = engine.policy = Timed(engine.policy)
    until = time.monotonic() + SECONDS
    while engine.has_work and time.monotonic() < until:
        engine.step()
    return {"looks": _figures(timed.looks), "steps": _figures(timed.steps), "all": _figures(timed.looks + timed.steps)}


def _figures(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    middle, high = np.percentile(seconds, [50, 99]) * 1e3
    return f"{np.mean(seconds) * 1e3:6.2f} mean {middle:6.2f} P50 {high:6.2f} P99 ({len(seconds)})"


def main() -> None:
    for count in COUNTS:
        for what, figures in measure(count).items():
            print(f"{count:6d} requests, {what:5s}  {figures}", flush=True)


if __name__ == "__main__":
    main()
