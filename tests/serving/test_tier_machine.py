"""A device, a host and a disk that are all too small, under any order of moves, copies, faults and departures."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvarn.serving.kvcache.copies import Direction
from kvarn.serving.policies.protocol import Decision, Snapshot
from kvarn.serving.request import Request

from .paged_text import continuation, make_engine, make_request, run
from .virtual_serving import Told, prompt


class TinyTiers(RuleBasedStateMachine):
    """Law: books agree after every move, nothing waits for ever, and every text is what it should be."""

    @initialize(blocks=st.integers(12, 20), slots=st.integers(1, 6), records=st.integers(1, 12), share=st.booleans())
    def start(self, blocks: int, slots: int, records: int, share: bool) -> None:
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        before = make_engine(host_slots=32, disk_records=records, folder=folder)
        for family in range(2):
            before.add(make_request(f"r{family}", prompt(24, family), 1))
        run(before)
        before.close()  # so the disk is not empty
        self.told = Told()
        self.engine = make_engine(
            num_blocks=blocks, host_slots=slots, disk_records=records, share=share, policy=self.told, folder=folder
        )
        self.tiers = self.engine.tiers
        self.copier, self.disk = self.tiers.copier, self.tiers.disk.io
        self.copier.wait = self.disk.wait = lambda seconds: None  # copies end when a rule says so
        self.requests: dict[str, Request] = {}
        self.texts: dict[str, list[int]] = {}

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(2000):  # bounded: whatever was done before, the rest takes no longer
            self.step()
            self.copier.complete()
            self.disk.complete()
            if not self.engine.has_work and not self.engine.settle():
                break
        assert not self.engine.has_work and not self.tiers.copying, "something waits for ever"
        for id, request in self.requests.items():
            text = continuation(request.tokens[: request.prompt_length].tolist(), request.params.max_tokens)
            cancelled = request.finish_reason == "cancelled"
            assert self.texts[id] == (text[: len(self.texts[id])] if cancelled else text)
        self.tiers.check([])
        assert self.engine.cache.pool.num_active == 0, "a device block leaked"
        assert self.tiers.host.num_available == self.tiers.host.num_slots, "a host slot leaked"
        self.disk.close()
        self.folder.cleanup()

    @rule(length=st.integers(1, 24), family=st.integers(0, 2), count=st.integers(1, 12))
    def come(self, length: int, family: int, count: int) -> None:
        request = make_request(f"r{len(self.requests)}", prompt(length, family), count)
        self.engine.add(request)
        self.requests[request.id], self.texts[request.id] = request, []

    @rule()
    def step(self) -> None:
        self.engine.clock.advance(1.0)
        for emission in self.engine.step():
            self.texts[emission.request.id] += [] if emission.token is None else [emission.token]

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data(), through_host=st.booleans())
    def take_off(self, data: st.DataObject, through_host: bool) -> None:
        running = [request.id for request in self.engine.running]
        chosen = tuple(data.draw(st.lists(st.sampled_from(running), min_size=1, unique=True)))

        def order(snapshot: Snapshot) -> Decision:
            still = {view.id for view in snapshot.running}  # copies may have ended meanwhile, requests not
            ids = tuple(id for id in chosen if id in still)
            return Decision(offload=ids) if through_host else Decision(preempt=ids)

        self.told.order = order
        self.step()

    @precondition(lambda self: self.engine.waiting)
    @rule(data=st.data())
    def bring_back(self, data: st.DataObject) -> None:
        waiting = [request.id for request in self.engine.waiting]
        chosen = tuple(data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique=True)))
        self.told.order = lambda snapshot: Decision(load=chosen)
        self.step()

    @precondition(lambda self: self.copier.queue)
    @rule(direction=st.sampled_from(Direction), fails=st.booleans())
    def end_a_copy(self, direction: Direction, fails: bool) -> None:
        self.copier.complete(direction, fail=fails)

    @precondition(lambda self: self.disk.queue)
    @rule(spoils=st.booleans())
    def end_a_disk_job(self, spoils: bool) -> None:
        self.disk.spoils = lambda: spoils
        self.disk.complete()

    @precondition(lambda self: self.disk.queue)
    @rule()
    def lose_the_disk(self) -> None:
        self.disk.fails = lambda: True
        self.disk.complete()

    @precondition(lambda self: self.engine.has_work)
    @rule(data=st.data())
    def vanish(self, data: st.DataObject) -> None:
        there = [*self.engine.waiting, *self.engine.loading, *self.engine.running]
        if there:
            self.engine.cancel(data.draw(st.sampled_from([request.id for request in there])))

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()


TestTinyTiers = TinyTiers.TestCase
TestTinyTiers.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
