"""What is told of streams: nothing is left out or counted twice, and where their KV lies is true."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.serving.api.messages import EngineStats, StreamReport, StreamsReport
from kvarn.serving.engine import Engine
from kvarn.serving.kvcache.copies import Direction
from kvarn.serving.policies.protocol import Decision, Policy, Snapshot
from kvarn.serving.policies.streaming.policy import Streaming
from kvarn.serving.request import Request
from kvarn.serving.streams_report import report_streams

from .paged_text import make_engine, make_request
from .virtual_serving import REQUESTS, arriving, prompt


def report(engine: Engine, limit: int = 1000) -> StreamsReport:
    return report_streams(engine, EngineStats(), limit)


def places(stream: StreamReport) -> tuple[int, int, int, int]:
    return stream.blocks, stream.device_blocks, stream.host_blocks, stream.disk_blocks


def steps(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.clock.advance(1.0)  # type: ignore[attr-defined]
        engine.step()


def settle(engine: Engine) -> None:
    """End all copies, to the disk too."""
    while engine.settle():
        engine.tiers.copier.complete()  # type: ignore[union-attr]
        if engine.tiers.disk is not None:  # type: ignore[union-attr]
            engine.tiers.disk.io.complete()  # type: ignore[union-attr]


def is_on(blocks: int, request: Request, known: object) -> None:
    """A tier that is said to have so many leading blocks has the last of them, and not the next."""
    hashes = request.block_hashes
    assert 0 <= blocks <= len(hashes)
    assert blocks == 0 or known(hashes[blocks - 1])  # type: ignore[operator]
    assert blocks == len(hashes) or not known(hashes[blocks])  # type: ignore[operator]


@settings(max_examples=60)
@given(REQUESTS, st.integers(20, 40), st.integers(4, 60), st.integers(0), st.integers(1, 10))
def test_streams_and_their_blocks_add_up_after_every_step(coming, num_blocks, slots, seed, limit):
    """Law: each request is told once, in order of urgency, and every count is that of the engine's own books."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        engine = make_engine(
            num_blocks=num_blocks, policy=Streaming(), host_slots=slots, folder=Path(folder), disk_records=40
        )
        engine.tiers.copier.job_seconds = 1e-3
        waiting = sorted(arriving(coming), key=lambda request: -request.arrival)
        for _ in range(400):
            while waiting and waiting[-1].arrival <= engine.clock.now():
                engine.add(waiting.pop())
            engine.step()
            engine.clock.advance(0.05)
            if rng.random() < 0.7:
                engine.tiers.copier.complete(rng.choice(list(Direction)))
            engine.tiers.disk.io.complete()
            check(engine, limit)
            if not waiting and not engine.has_work:
                break
        engine.tiers.disk.io.close()


def check(engine: Engine, limit: int) -> None:
    told, now = report(engine), engine.clock.now()
    tiers, by_id = engine.tiers, engine.requests
    assert sorted(stream.id for stream in told.streams) == sorted(by_id)
    queues = {"waiting": engine.waiting, "loading": engine.loading, "running": engine.running}
    for stream in told.streams:
        request = by_id[stream.id]
        assert request in queues[stream.state]
        assert stream.output_tokens >= stream.unread_tokens == request.reader.buffer(now)
        assert stream.blocks * 4 >= stream.prompt_tokens + stream.output_tokens > (stream.blocks - 1) * 4
        if stream.state == "waiting":
            is_on(stream.device_blocks, request, engine.cache.index.holds)
        else:
            assert stream.device_blocks == -(-request.num_computed // 4) <= request.num_blocks
        is_on(stream.host_blocks, request, tiers.host.holds)
        is_on(stream.disk_blocks, request, tiers.disk.index.holds)
    assert told.paused == sum(stream.paused for stream in told.streams) <= len(engine.running)
    urgency = [(stream.slack, stream.id) for stream in told.streams if stream.output_tokens]
    assert [slack for slack, _ in urgency] == sorted(slack for slack, _ in urgency)
    assert report(engine, limit).streams == told.streams[:limit]


class Moved:
    """Takes everybody off the device when it is told to; else has everybody computed but those it pauses."""

    def __init__(self, usual: Policy) -> None:
        self.usual = usual
        self.off = False
        self.paused: set[str] = set()

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        if self.off:
            return Decision(offload=tuple(view.id for view in snapshot.running))
        decision = self.usual.decide(snapshot, now)
        return Decision(grants=tuple(grant for grant in decision.grants if grant[0] not in self.paused))


def test_where_the_kv_of_one_stream_lives_as_it_is_moved(tmp_path):
    policy = Moved(Streaming())
    engine = make_engine(num_blocks=16, host_slots=16, token_budget=64, policy=policy, folder=tmp_path, disk_records=16)
    engine.add(make_request("a", prompt(30, 0), 20))
    assert places(report(engine).streams[0]) == (8, 0, 0, 0)
    steps(engine, 1)
    settle(engine)
    assert places(report(engine).streams[0]) == (8, 8, 7, 7)  # 30 of its 31 tokens computed; full blocks are copied
    policy.off = True
    steps(engine, 1)
    settle(engine)
    (stream,) = report(engine).streams
    assert stream.state == "waiting" and stream.preemptions == 1
    assert places(stream) == (8, 7, 7, 7)  # the device keeps them until somebody needs the room
    engine.cache.pool.release(engine.cache.pool.allocate(16), keep=lambda block: False)
    assert places(report(engine).streams[0]) == (8, 0, 7, 7)
    engine.tiers.disk.io.close()


def test_who_runs_but_has_no_part_in_a_step_is_paused():
    policy = Moved(Streaming())
    engine = make_engine(token_budget=64, policy=policy)
    for id in ("a", "b"):
        engine.add(make_request(id, prompt(10, 0), 20))
    steps(engine, 3)
    assert not any(stream.paused for stream in report(engine).streams)
    policy.paused = {"a"}
    steps(engine, 1)
    told = report(engine)
    assert {stream.id: (stream.state, stream.paused) for stream in told.streams} == {
        "a": ("running", True),
        "b": ("running", False),
    }
    assert told.paused == 1


def test_who_waits_for_a_token_comes_before_who_has_some_left():
    engine = make_engine(token_budget=64, max_running=2)
    engine.clock.advance(10.0)
    engine.add(make_request("slow", prompt(10, 0), 20, arrival=1.0, stream_rate=0.5))
    engine.add(make_request("fast", prompt(10, 1), 20, arrival=2.0, stream_rate=10_000.0))
    steps(engine, 3)
    engine.add(make_request("newcomer", prompt(10, 2), 20, arrival=3.0))
    engine.clock.advance(1.0)
    told = report(engine).streams
    assert [stream.id for stream in told] == ["newcomer", "fast", "slow"]
    assert told[1].slack == 0 and told[1].stalls > 0 and told[2].slack > 0 and told[2].stalls == 0
