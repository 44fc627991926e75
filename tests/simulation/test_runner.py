"""Simulated runs: nothing is lost, nothing depends on the machine, and time is the engine's alone."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.errors import CapacityError, KvarnError
from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.serving.clock import MonotonicClock
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.serving.policies.protocol import Decision, Snapshot
from kvarn.serving.request import Request
from kvarn.serving.rounds.hints import RoundHint, Segment
from kvarn.simulation.assemble import simulated_engine
from kvarn.simulation.prompts import prompt_tokens
from kvarn.simulation.report import summarize
from kvarn.simulation.runner import LEFT, Run, run
from kvarn.simulation.workloads import (
    Burst,
    Fixed,
    Poisson,
    RequestSpec,
    SegmentSpec,
    TruncatedNormal,
    synthesize,
    with_departures,
)

H200, LLAMA = load_accelerator("h200"), load_model_shape("llama3-8b")
SPECS = synthesize(
    60, Poisson(200.0), TruncatedNormal(300, 100, high=900), TruncatedNormal(120, 40, high=300), stream_rate=20.0
)


def make_engine(kv_tokens: int = 2048, **fields: object) -> Engine:
    kv_memory = int(kv_tokens * LLAMA.kv_bytes_per_token())
    usual = {"max_running": 32, "token_budget": 512, "kv_memory_bytes": kv_memory, "speculation": "off"}
    engine = simulated_engine(EngineConfig(**(usual | fields)), H200, LLAMA)  # type: ignore[arg-type]
    engine._check = True
    return engine


def as_json(done: Run) -> str:
    return json.dumps([summarize(done.records).to_json(), [record.token_times for record in done.records]])


def test_every_request_gets_all_its_tokens_in_order() -> None:
    engine = make_engine()
    done = run(engine, SPECS)
    assert engine.counters.preemptions > 0, "the pool is small enough to be fought for"
    for spec, record in zip(SPECS, done.records, strict=True):
        assert (record.arrival, record.stream_rate, record.error) == (spec.arrival, 20.0, None)
        assert len(record.token_times) == spec.output_tokens
        assert spec.arrival < record.token_times[0]
        assert list(record.token_times) == sorted(record.token_times)


def test_the_engine_is_told_of_segments_and_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (
        SegmentSpec(Segment("private", 20)),
        SegmentSpec(Segment("shared", 40), 7),
        SegmentSpec(Segment("task", 4)),
    )
    seen: list[Request] = []
    add = Engine.add
    monkeypatch.setattr(Engine, "add", lambda engine, request: (seen.append(request), add(engine, request)))
    done = run(make_engine(), [RequestSpec(0.0, 64, 3, segments=parts, round=RoundHint("r", 1, "a"))])
    assert done.records[0].ok
    assert (seen[0].segments, seen[0].round) == (tuple(part.segment for part in parts), RoundHint("r", 1, "a"))


@pytest.mark.parametrize("policy", ["fcfs", "fcfs-conservative", "streaming"])
def test_texts_end_where_they_do_though_their_clients_ask_for_more(policy: str) -> None:
    asked = [replace(spec, max_tokens=1500) for spec in SPECS]
    done = run(make_engine(4096, policy=policy), asked)
    assert [len(record.token_times) for record in done.records] == [spec.output_tokens for spec in SPECS]
    assert all(record.ok for record in done.records)


REQUESTS = st.lists(
    st.builds(
        RequestSpec,
        st.floats(0, 3), st.integers(1, 600), st.integers(1, 60),
        leaves_after=st.none() | st.floats(0.001, 3),
    ),
    min_size=1, max_size=20,
)  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(REQUESTS, st.integers(40, 200), st.integers(1, 8), st.integers(1, 512))
def test_every_request_ends_exactly_once(
    specs: list[RequestSpec], num_blocks: int, max_running: int, budget: int
) -> None:
    """Law: whatever comes and leaves, each request is heard of once and the pool is empty in the end."""
    engine = make_engine(num_blocks * 16, max_running=max_running, token_budget=budget)
    heard = []
    done = run(engine, specs, on_done=heard.append)
    assert len(heard) == len(specs) == len(done.records)
    assert {id(record) for record in heard} == {id(record) for record in done.records}
    for spec, record in zip(specs, done.records, strict=True):
        assert record.prompt_tokens == spec.prompt_tokens
        if record.error == LEFT:
            assert spec.leaves_after is not None
            assert len(record.token_times) < spec.output_tokens
        elif record.error is None:
            assert len(record.token_times) == spec.output_tokens
        else:
            assert spec.prompt_tokens + spec.output_tokens > num_blocks * 16, record.error
    assert not engine.has_work
    assert engine.cache.pool.num_active == 0


def test_the_same_workload_gives_the_same_bytes() -> None:
    assert as_json(run(make_engine(), SPECS)) == as_json(run(make_engine(), SPECS))


def test_a_slow_machine_simulates_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = as_json(run(make_engine(), SPECS[:10]))
    skewed = iter(range(10**9))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(skewed)))
    monkeypatch.setattr("kvarn.serving.engine.perf_counter", lambda: 1000.0 * next(skewed))
    assert as_json(run(make_engine(), SPECS[:10])) == expected


def test_clients_that_leave_free_what_they_held() -> None:
    specs = with_departures(SPECS, share=1.0, mean_seconds=0.3, seed=2)
    engine = make_engine()
    done = run(engine, specs)
    left = [record for record in done.records if record.error == LEFT]
    assert len(left) > 10
    assert engine.cache.pool.num_active == 0
    assert summarize(done.records).failures == {LEFT: len(left)}


def test_a_request_that_can_never_fit_is_refused_and_the_rest_goes_on() -> None:
    specs = [replace(SPECS[0], prompt_tokens=5000), *SPECS[1:4]]
    errors = [record.error for record in run(make_engine(), specs).records]
    assert errors == ["refused: context_length_exceeded", None, None, None]


def test_the_load_adds_up() -> None:
    engine = make_engine()
    load = run(engine, SPECS).load
    columns = load.columns()
    assert len(columns["times"]) == engine.counters.steps
    assert (columns["times"][1:] > columns["times"][:-1]).all()
    assert columns["running"].max() <= 32
    assert columns["active_blocks"].max() <= engine.cache.pool.num_blocks
    assert [columns[name][-1] for name in ("running", "waiting", "active_blocks")] == [0, 0, 0]


def test_shared_prefixes_are_computed_once() -> None:
    specs = [RequestSpec(float(i), 1200, 5, prefix_ids=(7, 8), prefix_block_tokens=512) for i in range(4)]
    engine = make_engine()
    run(engine, specs)
    assert engine.cache.hit_tokens == 3 * 1024
    assert engine.counters.prompt_tokens == 1200 + 3 * 176


@given(st.integers(1, 400), st.lists(st.integers(0, 2**60), max_size=5), st.integers(0, 10**6))
def test_prompts_are_equal_exactly_as_far_as_their_prefix_ids(length: int, ids: list[int], index: int) -> None:
    spec = RequestSpec(0.0, length, 1, prefix_ids=tuple(ids), prefix_block_tokens=64)
    one, other = prompt_tokens(spec, index, 1000), prompt_tokens(spec, index + 1, 1000)
    assert one.shape == (length,)
    assert 0 <= one.min() <= one.max() < 1000
    shared = min(64 * len(ids), length)
    assert (one[:shared] == other[:shared]).all()
    if length - shared > 16:
        assert (one[shared:] != other[shared:]).mean() > 0.5


def test_more_load_makes_people_wait_longer() -> None:
    waits = []
    for count in (10, 40, 160):
        done = run(make_engine(), synthesize(count, Burst(), Fixed(200), Fixed(20)))
        waits.append(summarize(done.records).ttft.p99)
    assert waits == sorted(waits)
    assert waits[2] > 3 * waits[1]


def test_an_engine_that_lets_requests_wait_for_ever_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        def decide(self, snapshot: Snapshot, now: float) -> Decision:
            return Decision()

    engine = make_engine()
    engine.policy = Idle()
    monkeypatch.setattr("kvarn.simulation.runner._STUCK_SECONDS", 1.0)
    with pytest.raises(RuntimeError, match="computed nothing"):
        run(engine, SPECS[:1])


def test_a_simulation_needs_a_virtual_clock() -> None:
    engine = make_engine()
    engine.clock = MonotonicClock()
    with pytest.raises(TypeError, match="VirtualClock"):
        run(engine, SPECS)


def test_impossible_engines_are_refused_in_words() -> None:
    with pytest.raises(CapacityError, match="no KV block fits"):
        simulated_engine(EngineConfig(), load_accelerator("rtx4090"), load_model_shape("qwen2.5-32b"))
    with pytest.raises(KvarnError, match="policy is"):
        simulated_engine(EngineConfig(policy="lottery"), H200, LLAMA)  # type: ignore[arg-type]


def test_smaller_weights_leave_room_for_more_tokens() -> None:
    pools = [
        simulated_engine(EngineConfig(precision=precision), H200, LLAMA).executor.num_blocks  # type: ignore[arg-type]
        for precision in ("float32", "bfloat16", "int8", "int4")
    ]
    assert pools == sorted(pools)
    assert pools[0] < pools[1] < pools[2] < pools[3]
