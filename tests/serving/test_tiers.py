"""Three tiers under an executor that notices any wrong block, whatever is preempted, copied, lost or cancelled when."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.serving.kvcache.copies import Direction
from kvarn.serving.policies.fcfs import FirstComeFirstServed
from kvarn.serving.policies.protocol import Decision, Snapshot
from kvarn.serving.request import RequestState

from .paged_text import continuation, make_engine, make_request, run
from .virtual_serving import Told

PROMPTS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2), st.integers(1, 24)), min_size=1, max_size=10)


def _prompt(length: int, family: int) -> list[int]:
    return [(family * 101 + i * 7) % 900 for i in range(length)]


class Whims:
    """First come first served, which also preempts, offloads, loads and pauses as it likes."""

    def __init__(self, rng: random.Random, often: float) -> None:
        self.rng = rng
        self.often = often
        self.usual = FirstComeFirstServed()

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        assert snapshot.tiers is not None
        if self.rng.random() > self.often:
            return self.usual.decide(snapshot, now)
        shuffled = list(snapshot.running)
        self.rng.shuffle(shuffled)
        preempt = [view.id for view in shuffled[:1]]
        offload = [view.id for view in shuffled[1:3]]
        load = [view.id for view in snapshot.waiting if self.rng.random() < 0.5]
        for view in snapshot.waiting:
            assert 0 <= snapshot.tiers.loadable_tokens(view.id) < view.num_tokens
        assert snapshot.tiers.coming_blocks >= 0
        return Decision(preempt=tuple(preempt), offload=tuple(offload), load=tuple(load))


class Dropped:
    """Preempts everybody at given steps; else first come first served, loading whom it can."""

    def __init__(self, offload_at: set[int], *, load: bool) -> None:
        self.offload_at = offload_at
        self.load = load
        self.usual = FirstComeFirstServed()
        self.asked = 0

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        assert snapshot.tiers is not None
        self.asked += 1
        if self.asked in self.offload_at:
            return Decision(offload=tuple(view.id for view in snapshot.running))
        if snapshot.loading:
            return Decision()
        back = [
            view.id
            for view in snapshot.waiting
            if snapshot.tiers.loadable_tokens(view.id) > snapshot.prefix_hit(view.id).tokens
        ]
        if self.load and back and not snapshot.running:
            return Decision(load=tuple(back))
        return self.usual.decide(snapshot, now)


@settings(max_examples=80, deadline=None)
@given(
    PROMPTS,
    st.one_of(st.just(16), st.integers(16, 40)),
    st.one_of(st.integers(4, 8), st.integers(1, 40)),
    st.floats(0, 0.6),
    st.floats(0, 0.3),
    st.booleans(),
    st.sampled_from([1e-6, 0.5]),
    st.one_of(st.none(), st.integers(1, 60)),
    st.sampled_from([0.0, 0.3, 0.03]),
    st.integers(0),
)
def test_text_is_right_whatever_is_moved_lost_or_cancelled(
    prompts, num_blocks, slots, often, failing, share, copy_seconds, records, disk_failing, seed
):
    """Law: tiers of any size, copies of any speed and failures never change a text, lose a block or stop the engine."""
    with tempfile.TemporaryDirectory() as folder:
        rng = random.Random(seed)
        engine = make_engine(
            num_blocks=num_blocks, share=share, policy=Whims(rng, often), host_slots=slots,
            folder=Path(folder) if records else None, disk_records=records or 0,
        )  # fmt: skip
        engine.tiers.copier.job_seconds = copy_seconds
        _run_through(engine, rng, prompts, failing, disk_failing)
        if engine.tiers.disk is not None:
            engine.tiers.disk.io.close()


def _run_through(engine, rng, prompts, failing, disk_failing):
    """Requests that come, are moved and are given up at random, on copies and a disk that fail at random."""
    copier = engine.tiers.copier
    if engine.tiers.disk is not None:
        engine.tiers.disk.io.spoils = lambda: rng.random() < disk_failing
        engine.tiers.disk.io.fails = lambda: rng.random() < disk_failing / 20
    coming = [make_request(f"r{i}", _prompt(length, f), count) for i, (length, f, count) in enumerate(prompts)]
    expected = {r.id: continuation(r.tokens[: r.prompt_length].tolist(), r.params.max_tokens) for r in coming}
    texts: dict[str, list[int]] = {request.id: [] for request in coming}
    cancelled = set()
    for step in range(3000):
        if step > 400:
            engine.policy.often = 0.0  # whims for ever could keep it from ever ending
        if coming and rng.random() < 0.5:
            engine.add(coming.pop())
        if not coming and not engine.has_work:
            break
        engine.clock.advance(1.0)
        for emission in engine.step():
            texts[emission.request.id] += [] if emission.token is None else [emission.token]
        while rng.random() < 0.5:
            copier.complete(rng.choice(list(Direction)), fail=rng.random() < failing)
        while engine.tiers.disk is not None and rng.random() < 0.7:
            engine.tiers.disk.io.complete()
        if rng.random() < 0.02 and engine.has_work:
            cancelled.add(id := rng.choice(list(engine.requests)))
            engine.cancel(id)
    assert not engine.has_work
    for id, text in texts.items():
        assert text == expected[id][: len(text)] if id in cancelled else text == expected[id]
    while engine.settle():
        copier.complete()
        if engine.tiers.disk is not None:
            engine.tiers.disk.io.complete()
    engine.tiers.check([])
    assert engine.cache.pool.num_active == 0
    assert engine.tiers.host.num_available == engine.tiers.host.num_slots


@pytest.mark.parametrize("steps", [10, 11, 12, 13])
def test_what_comes_back_from_the_host_is_not_computed_again(steps):
    """Whatever part of its last block it had filled."""
    engine = make_engine(num_blocks=16, host_slots=32, token_budget=64, policy=Dropped({steps}, load=True))
    prompt = _prompt(30, 0)
    engine.add(make_request("a", prompt, 20))
    for _ in range(steps):
        engine.clock.advance(1.0)
        engine.step()
    assert engine.waiting and not engine.running
    while engine.tiers.copier.queue:
        engine.tiers.copier.complete()
    engine._end_copies(engine.clock.now())
    evicted = engine.cache.pool.allocate(16)  # somebody else uses all of the device meanwhile
    engine.cache.pool.release(evicted, keep=lambda block: False)
    before = engine.executor.computed_tokens
    assert run(engine)["a"] == continuation(prompt, 20)[steps - 1 :]
    assert engine.counters.loads == 1
    # Of the tokens that were known, the last one is left to compute; then one a token.
    assert engine.executor.computed_tokens - before == 20 - (steps - 1)
    while engine.settle():
        engine.tiers.copier.complete()
    assert engine.tiers.host.num_available == engine.tiers.host.num_slots


def test_blocks_being_copied_are_nobodys_until_the_copy_has_ended():
    engine = make_engine(num_blocks=16, host_slots=32, token_budget=64, policy=Dropped({2}, load=False))
    engine.tiers.block_seconds = dict.fromkeys(Direction, 100.0)  # too slow to copy anything ahead
    engine.tiers.copier.wait = lambda seconds: None
    engine.add(make_request("a", _prompt(30, 0), 20))
    engine.step()
    assert engine.tiers.unmirrored(engine.running[0]) == 8
    engine.step()  # offloads
    assert engine.waiting and engine.cache.pool.num_active == 8
    while engine.tiers.copier.queue:
        engine.tiers.copier.complete()
    engine.tiers.collect()
    assert engine.cache.pool.num_active == 0 and engine.tiers.host.num_entries == 8


def test_without_room_on_the_host_requests_are_recomputed():
    engine = make_engine(num_blocks=40, host_slots=1, token_budget=64, policy=Dropped({5, 9}, load=True))
    for i in range(3):
        engine.add(make_request(f"r{i}", _prompt(20, i), 10))
    assert run(engine) == {f"r{i}": continuation(_prompt(20, i), 10) for i in range(3)}
    assert engine.tiers.host.num_entries <= 1


def test_who_leaves_the_device_gets_the_host_slots_of_who_stays():
    told = Told()
    engine = make_engine(num_blocks=40, host_slots=8, token_budget=64, policy=told)
    first = make_request("stays", _prompt(30, 0), 20)
    second = make_request("leaves", _prompt(30, 1), 20)
    for request in (first, second):
        engine.add(request)
        engine.step()
        engine.tiers.copier.close()
    assert engine.tiers.places(first).host == 7 and engine.tiers.places(second).host < 7, "the host is full"
    told.order = lambda snapshot: Decision(offload=("leaves",))
    engine.step()
    engine.tiers.copier.close()
    engine.settle()
    assert engine.tiers.places(second).host == 7 and engine.tiers.places(first).host == 0, "a partial block has one"
    assert engine.tiers.unmirrored(first) >= 7, "to be computed again if he leaves too"
    pool = engine.cache.pool
    pool.release(pool.allocate(pool.num_available), keep=lambda block: False)  # somebody else uses the rest meanwhile
    told.order = lambda snapshot: Decision(load=("leaves",))
    run(engine)
    assert engine.counters.loads == 1
    for request in (first, second):
        assert request.tokens[30:50].tolist() == continuation(_prompt(30, int(request is second)), 20)


def test_a_failed_load_is_recomputed():
    engine = make_engine(num_blocks=16, host_slots=32, token_budget=64, policy=Dropped({6}, load=True))
    engine.add(make_request("a", _prompt(30, 0), 12))
    for _ in range(6):
        engine.step()
    copier = engine.tiers.copier
    while copier.queue:
        copier.complete()
    engine._end_copies(0.0)
    engine.cache.pool.release(engine.cache.pool.allocate(16), keep=lambda block: False)
    texts: list[int] = []
    for _ in range(40):
        if not engine.has_work:
            break
        engine.clock.advance(1.0)
        copier.wait = lambda seconds: copier.complete(fail=True)
        texts += [emission.token for emission in engine.step()]
    assert texts == continuation(_prompt(30, 0), 12)[5:]
    assert engine.tiers.counters.failed_copies == 1 and engine.counters.loads == 0


def test_a_request_cancelled_while_its_blocks_arrive_leaves_nothing_behind():
    engine = make_engine(num_blocks=16, host_slots=32, token_budget=64, policy=Dropped({4}, load=True))
    engine.add(make_request("a", _prompt(30, 0), 12))
    copier = engine.tiers.copier
    for _ in range(4):
        engine.step()
    while copier.queue:
        copier.complete()
    engine._end_copies(0.0)
    engine.cache.pool.release(engine.cache.pool.allocate(16), keep=lambda block: False)
    copier.wait = lambda seconds: None
    engine.step()
    assert engine.loading and engine.loading[0].state is RequestState.LOADING
    engine.cancel("a")
    assert engine.cache.pool.num_active > 0, "the copy still writes there"
    copier.complete()
    engine.step()
    engine.tiers.check([])
    assert engine.cache.pool.num_active == 0


@pytest.mark.parametrize(("copy_seconds", "loads"), [(1e-6, 3), (60.0, 0)])
def test_first_come_first_served_loads_what_is_sooner_loaded_than_computed(copy_seconds, loads):
    engine = make_engine(num_blocks=20, host_slots=80, token_budget=64)
    engine.tiers.copier.job_seconds = copy_seconds
    engine.tiers.block_seconds = dict.fromkeys(Direction, copy_seconds)
    prompts = [_prompt(40, i) for i in range(3)]
    for turn in range(2):  # each prompt fills half of the device, so it is gone when it comes again
        for i, prompt in enumerate(prompts):
            engine.add(make_request(f"r{turn}{i}", prompt, 20))
        assert sorted(run(engine).values()) == sorted(continuation(prompt, 20) for prompt in prompts)
        engine.tiers.copier.close()
        assert not engine.settle()
    assert engine.counters.loads >= loads if loads else engine.counters.loads == 0
    assert engine.cache.hit_tokens >= 36 * loads


@pytest.mark.parametrize("share", [True, False])
def test_a_block_that_requests_share_is_kept_once(share):
    engine = make_engine(num_blocks=64, host_slots=64, token_budget=64, share=share)
    for i in range(3):
        engine.add(make_request(f"r{i}", _prompt(40, 0), 2, arrival=float(i)))
    run(engine)
    while engine.tiers.copier.queue:
        engine.tiers.copier.complete()
    engine.tiers.collect()
    assert engine.tiers.host.num_entries == (10 if share else 30)
