"""What a decision of the streaming policy costs on this machine, by how many requests there are.

A tenth of the requests fit the device at once, 250 at most; readers are so slow that four times as many are let in,
and the rest waits. A *look* is a decision that makes a new plan, at most a few times a tick; a *step* is any other.
Bringing a request back from the host costs what looking its blocks up costs, whoever decides it; a look that brings
many is counted with that.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.serving.policies.protocol import Decision, Snapshot
from kvarn.serving.policies.streaming.policy import Streaming
from kvarn.serving.reader import Reader
from kvarn.serving.request import Request
from kvarn.serving.sampling.params import SamplingParams
from kvarn.simulation.assemble import simulated_engine

_TOKENS = 20_000
"""Noted by a reader's clock to see what one costs."""


class Timed:
    """The policy, with the seconds of each decision."""

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


def time_decisions(count: int, seconds: float) -> Timed:
    """Serve `count` requests on a virtual clock for so many real seconds, or until all are done."""
    engine = _crowded(count)
    assert isinstance(engine.policy, Streaming)
    timed = engine.policy = Timed(engine.policy)
    until = time.monotonic() + seconds
    while engine.has_work and time.monotonic() < until:
        engine.step()
    return timed


def _crowded(count: int) -> Engine:
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


@dataclass(frozen=True)
class PolicyCost:
    """The cell: milliseconds of decisions, measured on this machine."""

    requests: int
    seconds: float
    repeat: int

    alone = True

    @property
    def cost(self) -> float:
        return self.seconds

    def run(self) -> dict[str, Any]:
        timed = time_decisions(self.requests, self.seconds)
        return {name: float(np.mean(found)) * 1e3 if found else 0.0 for name, found in _kinds(timed).items()}


@dataclass(frozen=True)
class TrackerCost:
    """The cell: microseconds in which a reader's clock notes a token and answers what is left."""

    repeat: int

    cost = 0.1
    alone = True

    def run(self) -> dict[str, Any]:
        reader, started = Reader(), time.perf_counter()
        for i in range(_TOKENS):
            reader.receive(i * 0.01)
            reader.slack(i * 0.01)
        return {"token": (time.perf_counter() - started) / _TOKENS * 1e6}


def _kinds(timed: Timed) -> dict[str, list[float]]:
    return {"all": timed.looks + timed.steps, "look": timed.looks, "step": timed.steps}
