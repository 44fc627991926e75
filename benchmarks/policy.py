"""What a decision of the streaming policy costs: seconds a call, on an engine full of requests, by how many there are.

    python benchmarks/policy.py

A quarter of the requests run, a quarter is off the device in the middle of a text, half has not begun. A *look* is a
decision that makes a new plan; it comes at most a few times a tick. A *step* is any other.
"""

from __future__ import annotations

import statistics
import time

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.serving.policies.streaming.policy import Streaming
from kvarn.serving.request import Request
from kvarn.serving.sampling.params import SamplingParams
from kvarn.simulation.assemble import simulated_engine

_BLOCKS_EACH = 4


def crowded(count: int) -> Engine:
    """An engine with so many requests, a quarter of them running and a quarter suspended."""
    accelerator, model = load_accelerator("h200"), load_model_shape("llama3-8b")
    blocks = count // 4 * _BLOCKS_EACH
    config = EngineConfig(
        policy="streaming", max_running=count, token_budget=4 * count, prefill_budget=4 * count, speculation="off",
        kv_memory_bytes=int(blocks * 16 * model.kv_bytes_per_token(2)), host_memory_bytes=64 << 30,
    )  # fmt: skip
    engine = simulated_engine(config, accelerator, model)
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    for i in range(count):
        prompt = [(i * 7 + j) % 1000 for j in range(40)]
        engine.add(Request.create(str(i), prompt, params, arrival=i * 1e-6))
    while len([request for request in engine.waiting if request.preemptions]) < count // 4:
        engine.step()
    return engine


def measure(count: int) -> tuple[float, float]:
    """Median seconds of a look and of a step."""
    engine = crowded(count)
    policy = engine.policy
    assert isinstance(policy, Streaming)
    looks, steps = [], []
    look, now = policy._look, 0.0
    looked = False

    def noting(*arguments: object) -> None:
        nonlocal looked
        looked = True
        look(*arguments)  # type: ignore[arg-type]

    policy._look = noting  # type: ignore[method-assign]
    decide = policy.decide

    def timed(snapshot, now):  # type: ignore[no-untyped-def]
        nonlocal looked
        looked = False
        started = time.perf_counter()
        decision = decide(snapshot, now)
        (looks if looked else steps).append(time.perf_counter() - started)
        return decision

    policy.decide = timed  # type: ignore[method-assign]
    while len(looks) < 20 or len(steps) < 40:
        engine.step()
    del now
    return statistics.median(looks), statistics.median(steps)


def main() -> None:
    for count in (400, 10_000):
        look, step = measure(count)
        print(f"{count:6d} requests: {look * 1e3:.2f} ms a look, {step * 1e3:.2f} ms a step")


if __name__ == "__main__":
    main()
