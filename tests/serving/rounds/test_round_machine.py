"""Rounds on engines that are too small for them, under any order of arrivals, departures, faults and repetitions."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvarn.errors import RequestError
from kvarn.serving.kvcache.copies import Direction
from kvarn.serving.request import FinishReason, Request
from kvarn.serving.rounds.hints import RoundHint
from kvarn.serving.speculation import Speculator
from tests.serving.paged_text import continuation, next_token
from tests.serving.rounds.societies import KINDS, Kind, Part, member, private, shared, society, words
from tests.serving.text_memory import check_index

SIZES = {"A": 1, "B": 2, "C": 3, "D": 4}
"""Members of each round."""
LENGTHS = (4, 6, 9, 14, 23)
"""Of the texts that are shared; the first is too short to be worth it, the last longer than some budgets."""
PARTS = st.lists(
    st.one_of(
        st.integers(0, 4).map(lambda text: shared(LENGTHS[text], text)),
        st.integers(0, 4).map(lambda text: shared(LENGTHS[text], text)),
        st.builds(private, st.integers(1, 13), st.integers(0, 3)),
    ),
    min_size=1,
    max_size=5,
)


class Rounds(RuleBasedStateMachine):
    """Law: books agree after every step, nothing waits for ever, every text is right, and prefixes are exact."""

    @initialize(
        kind=st.sampled_from(KINDS), blocks=st.integers(18, 44), memory=st.integers(3, 40), budget=st.integers(5, 24),
        sink=st.integers(0, 4), share=st.sampled_from([0.0, 0.3, 1.0]), collide=st.booleans(), drafts=st.booleans(),
        seed=st.integers(0, 99), mirrors=st.sampled_from([0, 1500, 4000, 10**6]),
    )  # fmt: skip
    def start(
        self, kind: Kind, blocks: int, memory: int, budget: int, sink: int, share: float, collide: bool, drafts: bool,
        seed: int, mirrors: int,
    ) -> None:  # fmt: skip
        self.engine = society(
            kind, num_blocks=blocks, segment_blocks=memory, token_budget=budget, sink=sink, share=share, step=0.25,
            segment_hash=(lambda content: b"x") if collide else None, mirror_bytes=mirrors,
            speculator=Speculator(4, only_where_it_pays=False) if drafts else None,
        )  # fmt: skip
        self.rng = random.Random(seed)
        if drafts:  # what repeats itself is guessed
            self.engine.executor.next_token = lambda context: next_token(context) % 3
        self.texts: dict[str, list[int]] = {}
        self.requests: dict[str, Request] = {}
        self.parts: dict[str, list[Part]] = {}

    @rule(
        parts=PARTS, count=st.integers(1, 9), round=st.sampled_from(["", "A", "B", "B", "C", "C", "D"]),
        agent=st.integers(0, 4), tenant=st.sampled_from(["", "", "other"]), told=st.booleans(),
        seconds=st.sampled_from([float("inf"), float("inf"), 0.5, 3.0]),
    )  # fmt: skip
    def come(
        self, parts: list[Part], count: int, round: str, agent: int, tenant: str, told: bool, seconds: float
    ) -> None:
        engine, now = self.engine, self.engine.clock.now()
        hint = RoundHint(round, SIZES[round], f"agent {agent}") if round else None
        request = member(
            f"r{len(self.requests)}", parts, count, round=hint, told=told or not round, tenant=tenant, arrival=now,
            deadline=now + seconds,
        )  # fmt: skip
        before = engine.rounds.num_held
        try:
            engine.add(request)
        except RequestError as error:
            assert error.status == 409 or error.code == "context_length_exceeded"
            assert engine.rounds.num_held == before
            return
        self.requests[request.id], self.texts[request.id], self.parts[request.id] = request, [], parts

    @rule(more=PARTS, count=st.integers(1, 9), said=st.booleans(), steps=st.integers(0, 40))
    def go_on_with(self, more: list[Part], count: int, said: bool, steps: int) -> None:
        """Those who were answered last have more to say."""
        self.go_on(steps)
        done = [id for id, each in self.requests.items() if each.finish_reason == FinishReason.LENGTH]
        for id in [id for id in done if self.requests[id].reused_tokens][-3:]:
            before = [(kind if said else "private", text) for kind, text in self.parts[id]]
            if sum(len(text) for _, text in before) < 150:
                parts = [*before, ("private", [*self.texts[id], 7]), *more]
                self.come(parts, count, "", 0, self.requests[id].tenant, True, float("inf"))

    @rule(
        round=st.sampled_from("BCDD"), texts=st.lists(st.integers(0, 4), min_size=1, max_size=4), data=st.data(),
        count=st.integers(1, 20), told=st.booleans(), apart=st.booleans(),
    )  # fmt: skip
    def gather(self, round: str, texts: list[int], data: st.DataObject, count: int, told: bool, apart: bool) -> None:
        """All of a round at once, each with the texts in an order of his own."""
        history = st.integers(0, 13)
        for agent in range(SIZES[round]):
            parts = [shared(LENGTHS[text], text) for text in data.draw(st.permutations(texts))]
            if apart:
                parts.insert(len(parts) // 2, private(3, 9 + agent))
            parts.insert(0, ("private", words(4, 99) + words(data.draw(history), agent)))
            self.come(parts, count, round, agent, "", told, float("inf"))

    @rule(steps=st.integers(1, 4))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    @rule()
    def time_passes(self) -> None:
        self.engine.clock.advance(5.0)

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data(), sure=st.integers(0, 3))
    def vanish(self, data: st.DataObject, sure: int) -> None:
        if sure:
            return
        self.engine.cancel(data.draw(st.sampled_from(sorted(self.engine.requests))))
        self.engine.check()

    @rule(which=st.sampled_from(["", "", "", "forward", "rounds"]))
    def break_down(self, which: str) -> None:
        if which == "rounds":
            self.engine.rounds.executor.fail_next = True
        elif which:
            self.engine.executor.fail_next = True

    def step(self) -> None:
        engine = self.engine
        for emission in engine.step():
            self.texts[emission.request.id] += [] if emission.token is None else [emission.token]
            if emission.error is not None:
                assert "boom" in emission.error, emission.error
        check_index(engine)
        while engine.tiers is not None and self.rng.random() < 0.6:
            engine.tiers.copier.complete(self.rng.choice(list(Direction)), fail=self.rng.random() < 0.1)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        engine = self.engine
        for _ in range(1500):
            if not engine.has_work:
                break
            self.step()
            engine.clock.advance(0.1)
        assert not engine.has_work, f"{engine.rounds._groups}, {engine.rounds._barrier._open}, {engine.waiting}"
        for _ in range(100):
            if engine.settle():
                engine.tiers.copier.complete()
        for id, request in self.requests.items():
            prompt = request.tokens[: request.prompt_length].tolist()
            text = continuation(prompt, request.params.max_tokens, engine.executor.next_token)
            whole = request.finish_reason == FinishReason.LENGTH
            assert self.texts[id] == (text if whole else text[: len(self.texts[id])]), id
        assert not any(segment.pins for segment in engine.cache.segments._by_key.values()), "a segment is pinned"
        engine.check()
        assert engine.cache.pool.num_active == 0, "a device block leaked"
        kept = engine.rounds.kept
        assert kept is None or not (kept._resumed or any(use.pins for use in kept.mirrors._uses.values()))
        assert not engine.executor.alive


TestRounds = Rounds.TestCase
TestRounds.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
