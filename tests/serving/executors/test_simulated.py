"""The simulated executor under the real engine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.hardware.roofline import Roofline, Work
from kvarn.serving.clock import VirtualClock
from kvarn.serving.engine import Engine
from kvarn.serving.executors.simulated import SimulatedExecutor
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.policies.fcfs import FirstComeFirstServed
from tests.serving.paged_text import make_request

ROOFLINE = Roofline(load_accelerator("h100"), load_model_shape("llama3-8b"))


def make_engine(num_blocks: int = 64, token_budget: int = 64) -> Engine:
    clock = VirtualClock()
    engine = Engine(
        SimulatedExecutor(ROOFLINE, clock, num_blocks=num_blocks),
        FirstComeFirstServed(), KVCache(num_blocks, 16), clock,
        token_budget=token_budget, max_running=8, max_context=1024, vocab_size=1000,
    )  # fmt: skip
    engine._check = True
    return engine


def test_the_clock_moves_by_the_modelled_time_of_each_batch() -> None:
    engine = make_engine()
    engine.add(make_request("a", list(range(100)), 3))
    moments = []
    while engine.has_work:
        engine.step()
        moments.append(engine.clock.now())
    batches = [([(0, 64)], 0), ([(64, 36)], 1), ([(100, 1)], 1), ([(101, 1)], 1)]
    passed = 0.0
    for moment, (rows, sampled) in zip(moments, batches, strict=True):
        passed += ROOFLINE.step_seconds(Work.of(rows, sampled))
        assert moment == pytest.approx(passed)
    assert engine.executor.forward_seconds == pytest.approx(passed)


def test_equal_prompts_go_on_alike_whatever_runs_beside_them() -> None:
    def text(others: int) -> list[int]:
        engine = make_engine()
        for i in range(others):
            engine.add(make_request(f"other{i}", [i, i + 1, i + 2], 20))
        engine.add(make_request("a", [1, 2, 3], 10))
        made = []
        while engine.has_work:
            made += [one.token for one in engine.step() if one.request.id == "a"]
        return made

    assert text(0) == text(5)
    assert len(text(0)) == 10


def test_it_runs_without_torch() -> None:
    program = (
        "import sys, kvarn.simulation.runner, kvarn.simulation.assemble, kvarn.serving.executors.simulated\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
