"""What a decision of the agentic policy costs on this machine: 1,000 wait, 200 run, and conversations are stalled."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.serving.agents.events import CallStart
from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.serving.policies.agentic.inversions import Metered
from kvarn.serving.policies.protocol import Decision, Policy, Snapshot
from kvarn.serving.request import Request
from kvarn.serving.sampling.params import SamplingParams
from kvarn.simulation.assemble import simulated_engine

_PROMPT, _OUTPUT = 200, 400


class Timed:
    """A policy, with the seconds of its decisions."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.seconds: list[float] = []

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        started = time.perf_counter()
        decision = self.policy.decide(snapshot, now)
        self.seconds.append(time.perf_counter() - started)
        return decision


@dataclass(frozen=True)
class PolicyCost:
    """The cell: milliseconds of decisions."""

    waiting: int
    running: int
    stalled: int
    seconds: float
    repeat: int

    alone = True

    @property
    def cost(self) -> float:
        return self.seconds

    def run(self) -> dict[str, Any]:
        engine = self._engine()
        self._stall(engine)
        for i in range(self.waiting + self.running):
            engine.add(self._request(f"a{i}", i, _OUTPUT))
        while len(engine.running) < 0.9 * self.running:
            engine.step()
        inner = Timed(engine.policy)
        outer = Timed(Metered(inner))
        engine.policy = outer
        crowd, until = [], time.monotonic() + self.seconds
        while len(engine.waiting) > 0.8 * self.waiting and time.monotonic() < until:
            crowd.append((len(engine.waiting), len(engine.running)))
            engine.step()
        waiting, running = np.mean(crowd, axis=0)
        return {
            "mean": float(np.mean(inner.seconds)) * 1e3, "p99": float(np.percentile(inner.seconds, 99)) * 1e3,
            "metered": float(np.mean(outer.seconds)) * 1e3, "waiting": float(waiting), "running": float(running),
            "stalled": len(engine.agents.held) if engine.agents else 0,
        }  # fmt: skip

    def _engine(self) -> Engine:
        accelerator, model = load_accelerator("h200"), load_model_shape("llama3-8b")
        pool = (self.running + self.stalled) * (_PROMPT + _OUTPUT) * model.kv_bytes_per_token(2)
        config = EngineConfig(
            policy="agentic", max_running=self.running, token_budget=8192, prefill_budget=8192, speculation="off",
            kv_memory_bytes=int(pool), host_memory_bytes=int(20 * pool),
        )  # fmt: skip
        return simulated_engine(config, accelerator, model)

    def _stall(self, engine: Engine) -> None:
        """Conversations whose tools run for an hour."""
        for i in range(self.stalled):
            engine.add(self._request(f"s{i}", 10_000 + i, 8))
        while engine.has_work:
            for emission in engine.step():
                if emission.finish_reason is not None:
                    engine.agent_event(CallStart(emission.request.id, tool="search", seconds=3600.0))

    def _request(self, id: str, number: int, output: int) -> Request:
        prompt = np.arange(_PROMPT, dtype=np.int32) * 7 % 1000 + number
        hints = AgentHints(program=f"p{id[0]}{number // 5}", agent=f"role {number % 7}", critical=number % 3 == 0)
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        return Request.create(id, prompt, params, arrival=number * 1e-6, agent=hints)
