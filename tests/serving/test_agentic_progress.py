"""Programs of agents on a device that is too small for them come to their ends, whatever the settings."""

from __future__ import annotations

import pytest

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.serving.config import EngineConfig
from kvarn.simulation.agents.player import play_programs
from kvarn.simulation.agents.workload import AgentWorkload, draw_programs
from kvarn.simulation.assemble import simulated_engine
from kvarn.simulation.workloads import Poisson

_SETS = [
    "like=agentic", "growth=0", "upload=reactive", "gradual=off", "preempt=off", "reserve=published",
    "like=published", "like=resident", "like=prefix-lru", "like=discard", "like=min-waste", "like=ttl",
    "like=continuum", "like=program-fcfs", "like=attained-service", "like=steps",
]  # fmt: skip


@pytest.mark.parametrize("option", _SETS)
def test_every_program_ends(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARN_CHECK", "1")
    accelerator, model = load_accelerator("a100-80"), load_model_shape("qwen2.5-14b")
    config = EngineConfig(
        policy="agentic", policy_options=(option,), token_budget=4096, prefill_budget=4096, speculation="off",
        kv_memory_bytes=int(260 * 16 * model.kv_bytes_per_token(2)),
    )  # fmt: skip
    engine = simulated_engine(config, accelerator, model)
    workload = AgentWorkload("deep-research", "d2", programs=3, arrivals=Poisson(4.0), token_scale=0.15, seed=3)
    run = play_programs(engine, draw_programs(workload))
    assert len(run.done) == 3
    assert not run.refused
    assert engine.agents is not None
    assert not engine.agents.desk.calls
    states = engine.block_states()
    assert states["free"] + states["cached"] == engine.cache.pool.num_blocks
