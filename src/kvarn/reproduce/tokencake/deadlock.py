"""The fixture in which the authors' port stood still: two requests come back from the host and do not fit together.

20 blocks of 16 tokens; A has 256 tokens and B 160, and of each 128 are on the host alone. A loader that gives both the
blocks for what they have there leaves neither the blocks for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.config import EngineConfig, PolicyName
from kvarn.serving.engine import Engine
from kvarn.serving.request import FinishReason, Request
from kvarn.serving.sampling.params import SamplingParams
from kvarn.simulation.assemble import simulated_engine

_ON_HOST = 128
_STEPS = 2000
_OUTPUTS = 8


@dataclass(frozen=True)
class Deadlock:
    """The cell: how many of the two finish, and what they found on the host."""

    policy: PolicyName = "agentic"

    cost = 0.1
    alone = False

    def run(self) -> dict[str, Any]:
        model = load_model_shape("qwen2.5-14b")
        pool = 20 * 16 * model.kv_bytes_per_token(2)
        config = EngineConfig(
            policy=self.policy, max_running=8, token_budget=512, prefill_budget=512, speculation="off",
            kv_memory_bytes=int(pool), host_memory_bytes=int(8 * pool),
        )  # fmt: skip
        engine = simulated_engine(config, load_accelerator("a100-80"), model)
        texts = {name: np.arange(256, dtype=np.int32) * 3 + start for name, start in (("A", 1), ("B", 20_000))}
        for name, text in texts.items():  # their beginnings go to the host ...
            engine.add(_request(f"{name}0", text[:_ON_HOST], 2))
            _run(engine)
        engine.add(_request("C", np.arange(317, dtype=np.int32) + 50_000, 2))
        _run(engine)  # ... and off the device
        left = sum(engine.cache.lookup(_request(name, text, 1)).tokens for name, text in texts.items())
        engine.add(_request("A", texts["A"], _OUTPUTS))
        engine.add(_request("B", texts["B"][:160], _OUTPUTS))
        requests = list(engine.waiting)
        finished = _run(engine)
        return {
            "finished": finished, "blocks": engine.cache.pool.num_blocks, "on_device": left,
            "from_host": sum(request.cached_tokens for request in requests),
        }  # fmt: skip


def _request(id: str, tokens: np.ndarray[Any, Any], outputs: int) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True)
    return Request.create(id, tokens, params, arrival=0.0, agent=AgentHints(program=id, agent="agent"))


def _run(engine: Engine) -> int:
    """Requests that end well within some thousand steps."""
    finished = 0
    for _ in range(_STEPS):
        if not engine.has_work:
            break
        before = engine.clock.now()
        emissions = engine.step()
        finished += sum(emission.finish_reason is FinishReason.LENGTH for emission in emissions)
        if not emissions and engine.clock.now() == before:
            engine.clock.advance(0.005)  # type: ignore[attr-defined]
    while engine.settle() and engine.tiers is not None:
        engine.tiers.wait(0.005)
    return finished
