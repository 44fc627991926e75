"""The streaming policy: what it ranks how, what it never does, and what comes of it behind the real engine."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.errors import KvarnError
from kvarn.reproduce.tokenflow.toy import SteadyCosts, play
from kvarn.serving.clock import VirtualClock
from kvarn.serving.costs import Costs
from kvarn.serving.policies.fcfs import FirstComeFirstServed
from kvarn.serving.policies.protocol import Decision, Policy, Snapshot
from kvarn.serving.policies.reserving import Reserving
from kvarn.serving.policies.streaming.balance import _swap_neighbours
from kvarn.serving.policies.streaming.crowd import Crowd
from kvarn.serving.policies.streaming.estimates import Estimates
from kvarn.serving.policies.streaming.gains import gains
from kvarn.serving.policies.streaming.policy import Streaming
from kvarn.serving.policies.streaming.settings import StreamingSettings
from kvarn.serving.reader import Reader

from .paged_text import PagedTextExecutor, continuation, make_engine, make_request
from .virtual_serving import REQUESTS, arriving, prompt, serve


class Noting:
    """A policy whose decisions are written down."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.decisions: list[tuple[float, Decision]] = []

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        decision = self.policy.decide(snapshot, now)
        self.decisions.append((now, decision))
        return decision


# ---- the order of things ---------------------------------------------------------------------------------


def _gain(slack: list[float], kind: str) -> list[float]:
    column = np.array(slack)
    settings = StreamingSettings(gain=kind)  # type: ignore[arg-type]
    length = np.full(len(slack), 1000.0)
    return gains(column, 20 * column, length, np.zeros(len(slack)), 0.5, 0.5, settings).tolist()


def test_an_empty_buffer_outranks_five_seconds_of_slack():
    empty, full = _gain([0.0, 5.0], "corrected")
    assert empty > full


def test_the_published_gain_has_it_the_other_way_round():
    empty, full = _gain([0.0, 5.0], "published")
    assert empty < full
    # And its scale is tokens: half a second of text is as good as ten.
    half, ten = _gain([0.5, 4.0], "published")
    assert half == pytest.approx(ten, rel=1e-3)


def test_two_places_for_three_readers_change_hands_when_the_buffers_are_there():
    played = play()
    assert played.preemptions[:2] == [(3.0, "R1"), (5.0, "R2")]
    assert {id: starts[0] for id, starts in played.starts.items()} == {"R1": 0.0, "R2": 0.0, "R3": 3.0}
    assert played.starts["R1"][1] == 5.0
    assert played.stalls == 0


def test_one_makes_room_for_two_who_together_gain_more():
    order, blocks, gained = [0, 1, 2], [10.0, 5.0, 5.0], [5.0, 4.0, 3.0]
    chosen = [True, False, False]
    _swap_neighbours(order, chosen, blocks, gained, room=0.0, places=1)
    assert chosen == [False, True, True]
    for room, places, gained in ((-1.0, 1, [5.0, 4.0, 3.0]), (0.0, 0, [5.0, 4.0, 3.0]), (0.0, 1, [8.0, 4.0, 3.0])):
        chosen = [True, False, False]
        _swap_neighbours(order, chosen, blocks, gained, room, places)
        assert chosen == [True, False, False]


def test_overload_ends_only_when_demand_is_clearly_below_what_is_generated():
    """A step of 0.1 s for 8 rows generates 80 tokens/s; every reader takes 10."""
    snapshot = Snapshot(
        (), (), 0, SIZE, 64, 8, num_blocks=1000, prefix_hit=lambda id: Hit(), reclaimable_blocks=lambda id: 0,
        shares_prefix=lambda id, other, tokens: False, costs=SteadyCosts(0.1),
    )  # fmt: skip
    estimates, overloaded = Estimates(StreamingSettings(relief=0.2)), []
    for readers in (8, 9, 8, 7, 6, 7, 8):
        waiting = [View(f"w{i}", 10, 0, 0, Reader(10.0), preemptions=1) for i in range(readers)]
        estimates.note(snapshot, Crowd(snapshot, waiting, 0.0), 0.0)
        overloaded.append(bool(estimates.overloaded))
    assert overloaded == [False, True, True, True, False, False, False]


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(KvarnError, match="tick"):
        StreamingSettings(tick=0.0)
    with pytest.raises(KvarnError, match="pause_below"):
        StreamingSettings(pause_below=0.5)


def test_settings_are_read_from_words():
    chosen = StreamingSettings.parse(["tick=0.5", "pause=eager", "offload=off", "max_preemptions=3"], urgency=2.0)
    assert chosen == StreamingSettings(tick=0.5, pause="eager", offload=False, max_preemptions=3, urgency=2.0)
    for option, expected in (
        ("tok=1", "tick"), ("tick=fast", "a number"), ("max_preemptions=1.5", "whole number"),
        ("pause=never", "needed, eager, always, off"), ("offload=2", "on or off"), ("tick=0", "above 0"),
        ("tick=-1", "0 or more"), ("tick=inf", "a number"), ("retention=nan", "a number"),
        ("headroom_blocks=-1", "0 or more"), ("prefill_budget=0", "1 or more"),
    ):  # fmt: skip
        with pytest.raises(KvarnError, match=expected):
            StreamingSettings.parse([option])


# ---- what a decision never does --------------------------------------------------------------------------

SIZE = 4


@dataclass
class View:
    id: str
    num_tokens: int
    num_computed: int
    num_blocks: int
    reader: Reader
    arrival: float = 0.0
    moved_at: float = -1.0
    preemptions: int = 0
    priority: int = 0
    prompt_length: int = 1
    max_outputs: int = 100
    slot_surplus: int = 0

    @property
    def num_slots(self) -> int:
        return self.num_tokens + self.slot_surplus

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def num_outputs(self) -> int:
        return self.num_tokens - self.prompt_length


@dataclass(frozen=True)
class Hit:
    tokens: int = 0
    idle_blocks: int = 0

    @property
    def blocks(self) -> int:
        return self.tokens // SIZE


@dataclass
class HostView:
    """A host that holds some of some requests."""

    loadable: dict[str, int] = field(default_factory=dict)
    dirty: dict[str, int] = field(default_factory=dict)
    host_blocks: int = 1000
    coming_blocks: int = 0

    def loadable_tokens(self, id: str) -> int:
        return self.loadable.get(id, 0)

    def unmirrored_blocks(self, id: str) -> int:
        return self.dirty.get(id, 0)

    def write_seconds(self, blocks: int) -> float:
        return blocks * 1e-4

    def read_seconds(self, blocks: int) -> float:
        return blocks * 1e-4

    def load_seconds(self, id: str, blocks: int) -> float:
        return blocks * 1e-4


def _reader(slack: float, rate: float, now: float) -> Reader:
    reader = Reader(rate)
    reader.receive(now - 1.0)
    while reader.slack(now) < slack:
        reader.receive(now - 1.0)
    return reader


@st.composite
def _crowds(draw):
    now = 100.0
    waiting, running, host = [], [], HostView()
    for i in range(draw(st.integers(0, 8))):
        tokens = draw(st.integers(2, 60))
        computed = draw(st.sampled_from([tokens - 1, tokens - 1, draw(st.integers(0, tokens - 1))]))
        moved_at = draw(st.sampled_from([0.0, 99.99]))
        reader = _reader(draw(st.floats(0, 8)), draw(st.sampled_from([5.0, 20.0])), now)
        running.append(View(f"r{i}", tokens, computed, -(-computed // SIZE), reader, float(i), moved_at))
        host.dirty[f"r{i}"] = draw(st.integers(0, computed // SIZE))
    for i in range(draw(st.integers(0, 8))):
        tokens = draw(st.integers(1, 60))
        if draw(st.booleans()):
            reader = _reader(draw(st.floats(0, 8)), 20.0, now)
            waiting.append(View(f"w{i}", tokens, 0, 0, reader, float(i), preemptions=1))
            host.loadable[f"w{i}"] = draw(st.integers(0, tokens - 1)) // SIZE * SIZE
        else:
            waiting.append(View(f"w{i}", tokens, 0, 0, Reader(20.0), float(10 + i)))
    waiting.sort(key=lambda view: view.arrival)
    return running, waiting, host, draw(st.integers(0, 40)), draw(st.integers(8, 64))


@settings(max_examples=300, deadline=None)
@given(_crowds(), st.booleans())
def test_a_decision_fits_and_takes_nobody_off_who_needs_to_stay(crowd, with_host):
    """Law: grants and loads fit tokens, blocks and places; nobody short of tokens or just moved gives way before
    somebody who is neither; nobody is in two parts of a decision."""
    running, waiting, host, available, budget = crowd
    held = {view.id: view.num_blocks for view in running}
    snapshot = Snapshot(
        waiting, running, available, SIZE, budget, 8, sum(held.values()) + available, prefix_hit=lambda id: Hit(),
        reclaimable_blocks=held.__getitem__, shares_prefix=lambda id, other, tokens: False, costs=Costs(),
        tiers=host if with_host else None,
    )  # fmt: skip
    now = 100.0
    policy = Streaming()
    decision = policy.decide(snapshot, now)
    by_id = {view.id: view for view in running + waiting}
    granted = dict(decision.grants)
    gone = [*decision.preempt, *decision.offload]
    parts = [*granted, *gone, *decision.load]
    assert len(parts) == len(set(parts))
    assert set(gone) <= set(held) and set(decision.load) <= {view.id for view in waiting}
    assert sum(granted.values()) <= budget
    assert all(1 <= tokens <= by_id[id].num_uncomputed for id, tokens in granted.items())
    needed = sum(max(0, -(-(by_id[id].num_computed + n) // SIZE) - by_id[id].num_blocks) for id, n in granted.items())
    needed += sum(host.loadable[id] // SIZE for id in decision.load)
    freed = sum(held[id] for id in gone) - sum(host.dirty[id] for id in decision.offload)
    assert needed <= available + freed
    admitted = sum(id not in held for id in granted)
    assert len(running) - len(gone) + admitted + len(decision.load) <= 8

    def able(view: View) -> bool:
        settled = view.num_uncomputed <= 1 and view.moved_at <= now - policy._stay
        return settled and view.reader.slack(now) >= policy._critical

    if not all(able(by_id[id]) for id in gone):
        # Those who decode are granted theirs first; what prompts then lack, prompts give.
        assert not [view for view in running if able(view) and view.id not in gone and view.id not in granted]


def test_nobody_gives_way_for_blocks_that_are_coming():
    """Six without a copy on the host; two need a block and there is none. One goes, and what he has is on its way."""
    running = [View(f"r{i}", 21, 20, 5, _reader(2.0 + i, 20.0, 100.0), float(i), 0.0) for i in range(2)]
    running += [View(f"r{i}", 20, 19, 5, _reader(2.0 + i, 20.0, 100.0), float(i), 0.0) for i in range(2, 6)]
    host = HostView(dirty={view.id: 5 for view in running})
    snapshot = Snapshot(
        (), running, 0, SIZE, 64, 8, 30, prefix_hit=lambda id: Hit(), reclaimable_blocks=lambda id: 5,
        shares_prefix=lambda id, other, tokens: False, costs=Costs(), tiers=host,
    )  # fmt: skip
    policy = Streaming(StreamingSettings(overload=0.01))  # so that it looks at once
    policy.estimates.supply = 1.0
    decision = policy.decide(snapshot, 100.0)
    assert (decision.preempt, decision.offload) == ((), ("r5",))
    assert [grant.id for grant in decision.grants] == ["r2", "r3", "r4"]
    # The next step: the copies have not ended.
    later = replace(snapshot, running=running[:5], tiers=replace(host, coming_blocks=5))
    decision = policy.decide(later, 100.05)
    assert (decision.preempt, decision.offload) == ((), ())
    assert [grant.id for grant in decision.grants] == ["r2", "r3", "r4"]


# ---- behind the engine -----------------------------------------------------------------------------------


_SETTINGS = st.sampled_from(
    [
        StreamingSettings(),
        StreamingSettings(tick=0.1, safety=1.0),
        StreamingSettings(gain="published"),
        StreamingSettings(offload=False, pause="off"),
        StreamingSettings(local_search=False, hysteresis=False, tick=0.1),
        StreamingSettings(pause="eager", pause_above=0.02, pause_below=0.01, tick=0.2),
        StreamingSettings(overload=100.0, max_preemptions=1),
        StreamingSettings(overload=0.01, prefill_budget=3),
    ]
)


@settings(max_examples=120, deadline=None)
@given(REQUESTS, _SETTINGS, st.integers(20, 60), st.integers(0, 60), st.floats(0, 0.4), st.integers(0))
def test_every_text_is_right_and_ends(requests, chosen, num_blocks, slots, failing, seed):
    """Law: whatever comes and whatever copies do, each text is what it should be and ends in bounded time."""
    rng = random.Random(seed)
    engine = make_engine(num_blocks=num_blocks, policy=Streaming(chosen), host_slots=slots, step=0.05)
    coming = arriving(requests)
    expected = {r.id: continuation(r.tokens[: r.prompt_length].tolist(), r.params.max_tokens) for r in coming}
    texts, times = serve(engine, coming, rng, failing=failing)
    assert texts == expected
    ended = max(of_one[-1] for of_one in times.values())
    # One token a step would take this long; a pause of everybody lasts no longer than what they have to read.
    assert ended <= 10 + sum(0.05 * (4 * length + 4 * count) + count / rate for length, _, count, _, rate in requests)


def test_while_nobody_has_to_wait_it_is_first_come_first_served():
    decisions = []
    for policy in (FirstComeFirstServed(), Streaming()):
        noting = Noting(policy)
        engine = make_engine(num_blocks=200, policy=noting, host_slots=50, step=0.01, token_budget=64)
        engine.tiers.copier.wait = lambda seconds: None
        coming = [make_request(f"r{i}", prompt(20 + i, i), 60, arrival=0.2 * i) for i in range(12)]
        serve(engine, coming, random.Random(0), copying=0.0)
        decisions.append([(now, decision.grants, decision.preempt) for now, decision in noting.decisions])
    assert decisions[0] == decisions[1]


def _burst(policy: Policy, *, step: float, rate: float, count: int = 24, declared: float = 1.0):
    """A burst of 24 texts with room for 8: times of their tokens, and their requests."""
    engine = make_engine(
        num_blocks=170, policy=policy, host_slots=1000, step=step, token_budget=64, max_running=24, share=False
    )
    coming = [make_request(f"r{i}", prompt(20, i), 60, stream_rate=declared * rate) for i in range(count)]
    texts, times = serve(engine, coming, random.Random(0), copying=0.9)
    assert texts == {r.id: continuation(r.tokens[:20].tolist(), 60) for r in coming}
    return times, coming


class Standing:
    """Lets a machine stand still for `seconds` after so many steps."""

    def __init__(self, executor: PagedTextExecutor, clock: VirtualClock, *, after_steps: int, seconds: float) -> None:
        self.until = 0.0
        self.steps_left = after_steps
        self.usual, executor.step_seconds = executor.step_seconds, self.step
        self.clock, self.seconds = clock, seconds

    def step(self) -> None:
        self.usual()
        self.steps_left -= 1
        if self.steps_left == 0:
            self.clock.advance(self.seconds)
            self.until = self.clock.now()


def _stalls(times: dict[str, list[float]], rate: float) -> float:
    readers = [Reader(rate) for _ in times]
    for reader, of_one in zip(readers, times.values(), strict=True):
        for time in of_one:
            reader.receive(time)
    return sum(reader.stall_seconds for reader in readers)


def test_a_burst_gets_its_first_tokens_sooner_and_its_readers_never_wait():
    """Readers of 5 tokens/s, 20 steps/s, so the device is fast enough."""
    usual, _ = _burst(FirstComeFirstServed(), step=0.05, rate=5.0)
    ours, _ = _burst(Streaming(StreamingSettings(tick=0.25)), step=0.05, rate=5.0)
    assert max(of_one[0] for of_one in ours.values()) < 0.5 * max(of_one[0] for of_one in usual.values())
    assert _stalls(ours, 5.0) == 0.0 < _stalls(usual, 5.0)


@pytest.mark.parametrize("slots", [2, 20])
def test_a_host_without_room_empties_no_device(slots):
    """Room for 8 texts, a host that is soon full: what is given up comes free late, and few have to go for a block."""
    noting = Noting(Streaming())
    engine = make_engine(
        num_blocks=170, policy=noting, host_slots=slots, step=0.05, token_budget=64, max_running=24, share=False
    )
    coming = [make_request(f"r{i}", prompt(20, i), 60, stream_rate=5.0) for i in range(24)]
    serve(engine, coming, random.Random(0), copying=0.9)
    assert max(len(decision.preempt) + len(decision.offload) for _, decision in noting.decisions) <= 2


@pytest.mark.parametrize("declared", [0.5, 2.0])
def test_clients_that_are_wrong_about_their_rate_are_served_without_a_pause(declared):
    """Even where that makes the device look too slow for them all, and the last one has to wait."""
    usual, _ = _burst(Reserving(), step=0.05, rate=5.0)
    ours, _ = _burst(Streaming(StreamingSettings(tick=0.25)), step=0.05, rate=5.0, declared=declared)
    assert max(of_one[0] for of_one in ours.values()) <= 1.2 * max(of_one[0] for of_one in usual.values())
    assert _stalls(ours, 5.0) == 0.0


def test_after_the_machine_stood_still_everybody_is_served_in_turn():
    """Half a minute without a step, and every stream is at once critical."""
    engine = make_engine(
        num_blocks=170, policy=Streaming(), host_slots=40, step=0.05, token_budget=64, max_running=24, share=False
    )
    coming = [make_request(f"r{i}", prompt(20, i), 60, stream_rate=4.0) for i in range(24)]
    stood = Standing(engine.executor, engine.clock, after_steps=120, seconds=30.0)
    texts, times = serve(engine, coming, random.Random(0), copying=0.9)
    assert texts == {r.id: continuation(r.tokens[:20].tolist(), 60) for r in coming}
    reading = [of_one for of_one in times.values() if of_one[0] < stood.until < of_one[-1]]
    assert len(reading) > 8, "more than there is room for"
    assert max(min(time for time in of_one if time > stood.until) for of_one in reading) < stood.until + 5.0
    gaps = [later - earlier for of_one in reading for earlier, later in pairwise(of_one) if earlier > stood.until]
    assert max(gaps) < 15.0


def test_where_everybody_is_short_of_tokens_nobody_is_left_out():
    """5 steps/s for readers of 20 tokens/s: they take turns, and no turn is far away."""
    times, _ = _burst(Streaming(StreamingSettings(overload=1000.0)), step=0.2, rate=20.0)
    gaps = [later - earlier for of_one in times.values() for earlier, later in pairwise(of_one)]
    assert max(gaps) < 30.0
