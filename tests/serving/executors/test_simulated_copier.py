"""Copies over a modelled link, alone and under the real tiers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.links import HostLink
from kvarn.hardware.models import load_model_shape
from kvarn.serving.clock import VirtualClock
from kvarn.serving.config import EngineConfig
from kvarn.serving.executors.simulated_copier import SimulatedCopier
from kvarn.serving.kvcache.copies import CopyJob, Direction
from kvarn.serving.policies.protocol import Decision, Grant, Snapshot
from kvarn.simulation.assemble import simulated_engine
from kvarn.simulation.runner import run
from kvarn.simulation.workloads import RequestSpec

H100 = replace(load_accelerator("h100"), device_to_host=1000.0, host_to_device=500.0)


def job(direction: Direction, blocks: int) -> CopyJob:
    return CopyJob(direction, list(range(blocks)), list(range(blocks)), [0] * blocks)


def test_jobs_end_when_their_bytes_have_passed_and_both_ways_at_once() -> None:
    clock = VirtualClock(10.0)
    copier = SimulatedCopier(HostLink(H100), clock, block_bytes=100)
    out, second, back = job(Direction.TO_HOST, 10), job(Direction.TO_HOST, 5), job(Direction.TO_DEVICE, 10)
    for one in (out, second, back):
        copier.start(one)
    assert copier.finished() == []
    copier.wait(0.25)
    assert clock.now() == 10.25
    copier.wait(5.0)
    assert clock.now() == 11.0
    assert copier.finished() == [out]
    copier.wait(5.0)
    assert copier.finished() == [second]
    copier.close()
    assert (clock.now(), copier.finished()) == (12.0, [back])
    assert (out.seconds, second.seconds, back.seconds) == (1.0, 0.5, 2.0)


class OffloadOnce:
    """Runs one request; takes it off the device once it has made `after` tokens, and brings it back."""

    def __init__(self, after: int) -> None:
        self.after, self.offloaded = after, False

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        if snapshot.loading:
            return Decision()
        if snapshot.waiting:
            id = snapshot.waiting[0].id
            if not self.offloaded:
                return Decision(grants=(Grant(id, 512),))
            assert snapshot.tiers is not None
            ready = snapshot.tiers.loadable_tokens(id) > snapshot.prefix_hit(id).tokens
            return Decision(load=(id,)) if ready else Decision(grants=(Grant(id, 512),))
        (request,) = snapshot.running
        if request.num_outputs == self.after and not self.offloaded:
            self.offloaded = True
            return Decision(offload=(request.id,))
        return Decision(grants=(Grant(request.id, 512),))


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_a_request_goes_to_the_host_and_comes_back(share_prefixes: bool) -> None:
    engine = simulated_engine(
        EngineConfig(share_prefixes=share_prefixes, kv_memory_bytes=2**28, host_memory_bytes=2**29),
        load_accelerator("h100"), load_model_shape("llama3-8b"),
    )  # fmt: skip
    engine.policy = OffloadOnce(5)
    engine._check = True
    done = run(engine, [RequestSpec(0.0, 300, 40)])
    assert len(done.records[0].token_times) == 40
    assert engine.counters.preemptions == 1
    assert engine.cache.pool.num_active == 0
    assert engine.tiers is not None
    assert engine.tiers.counters.written_blocks >= 300 // 16
    assert not engine.tiers.copying
