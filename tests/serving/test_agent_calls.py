"""Agents on a real engine that is too small for them: requests, tool calls, events, copies and faults in any order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvarn.errors import RequestError
from kvarn.serving.agent_calls import AgentCalls
from kvarn.serving.agents.events import CallFinish, CallProgress, CallStart, Close
from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.engine import Engine
from kvarn.serving.kvcache.copies import CopyRules, Direction
from kvarn.serving.policies.agentic.policy import Agentic
from kvarn.serving.policies.agentic.settings import SETS, AgenticSettings
from kvarn.serving.policies.registry import POLICIES
from kvarn.serving.request import Request

from .paged_text import continuation, make_engine, make_request
from .virtual_serving import prompt

HINTS = st.one_of(
    st.none(),
    st.builds(
        AgentHints, program=st.sampled_from(["", "p", "q"]), agent=st.sampled_from(["", "coder", "judge"]),
        node=st.sampled_from(["", "n"]), depth=st.integers(0, 3), fan_out=st.integers(0, 3),
        remaining_seconds=st.sampled_from([-1.0, 0.0, 30.0]), critical=st.booleans(),
        join=st.sampled_from(["", "j"]), importance=st.integers(0, 10), tool_seconds=st.sampled_from([-1.0, 3.0]),
    ),
)  # fmt: skip
SECONDS = st.sampled_from([None, -1.0, 0.5, 3.0, 3.0, 20.0])
TENANTS = st.sampled_from(["", "", "other"])


def agent_engine(wishes: AgenticSettings = SETS["agentic"], **engine: object) -> Engine:
    """An engine of 4-token blocks under the agentic policy; texts are right only if every block is."""
    wishes = replace(wishes, prefill_budget=8)
    made = make_engine(policy=Agentic(wishes), step=0.05, **engine)  # type: ignore[arg-type]
    made.agents = AgentCalls(made.cache, made.tiers)
    return made


def step(engine: Engine, copy: bool = True) -> dict[str, list[int]]:
    """One step, in which time passes; what it made. `copy`: all copies end, else none unless the engine waits."""
    if copy and engine.tiers is not None:
        while engine.tiers.copier.queue:
            engine.tiers.copier.complete()
    engine.clock.advance(0.05)
    made: dict[str, list[int]] = {}
    for emission in engine.step():
        made.setdefault(emission.request.id, [])
        if emission.token is not None:
            made[emission.request.id].append(emission.token)
    return made


def finish(engine: Engine, most: int = 4000) -> dict[str, list[int]]:
    """Step until all requests have ended: their texts."""
    texts: dict[str, list[int]] = {}
    for _ in range(most):
        if not engine.has_work:
            return texts
        for id, tokens in step(engine).items():
            texts.setdefault(id, []).extend(tokens)
    raise AssertionError(f"{len(engine.waiting)} wait for ever, {len(engine.running)} run")


def let_time_end(engine: Engine) -> None:
    """Past every deadline; then nothing may be held."""
    assert engine.agents is not None
    for _ in range(3):
        engine.clock.advance(5000.0)
        engine.settle()
        while engine.tiers is not None and engine.tiers.copier.queue:
            engine.tiers.copier.complete()
            engine.settle()
    engine.check()
    assert not engine.agents.desk.calls, "a call outlives its deadline"
    assert not list(engine.agents.held) and engine.agents.is_empty
    assert engine.cache.pool.num_active == 0, "a device block leaked"
    if engine.tiers is not None:
        assert engine.tiers.host.num_available == engine.tiers.host.num_slots, "a host slot leaked"


class TinyAgents(RuleBasedStateMachine):
    """Law: books agree after every move, every text is right, nobody waits for ever, and nothing is left behind."""

    @initialize(
        like=st.sampled_from(["agentic", "agentic", "published", *SETS]), blocks=st.integers(8, 24),
        slots=st.sampled_from([0, 4, 40, 40, 40]), max_running=st.integers(1, 8),
        share=st.sampled_from([True, True, True, False]),
        write_ahead=st.sampled_from(["most slack first", "off"]), allowance=st.sampled_from([0.05, 0.5, 1.0]),
    )  # fmt: skip
    def start(self, like, blocks, slots, max_running, share, write_ahead, allowance) -> None:
        self.engine = agent_engine(
            replace(SETS[like], allowance=allowance),
            num_blocks=blocks, host_slots=slots, max_running=max_running, share=share,
        )  # fmt: skip
        if self.engine.tiers is not None:
            self.engine.tiers.rules = CopyRules(write_ahead)  # type: ignore[arg-type]
            self.engine.tiers.copier.wait = lambda seconds: None  # copies end when a rule says so
        self.requests: dict[str, Request] = {}
        self.texts: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(4000):
            if not self.engine.has_work:
                break
            self.note(step(self.engine))
        assert not self.engine.has_work, "somebody waits for ever"
        for id, request in self.requests.items():
            text = continuation(request.tokens[: request.prompt_length].tolist(), request.params.max_tokens)
            assert self.texts[id] == (text[: len(self.texts[id])] if id in self.cancelled else text)
        let_time_end(self.engine)

    def there(self) -> list[str]:
        """Requests that have not ended."""
        return [id for id, request in self.requests.items() if request.finish_reason is None]

    def note(self, made: dict[str, list[int]]) -> None:
        for id, tokens in made.items():
            self.texts[id] += tokens

    def add(self, tokens: list[int], count: int, seconds: float, **fields: object) -> None:
        """`seconds`: of the tool call with which it will end; None for none."""
        id, room = f"r{len(self.requests)}", self.engine.max_context
        tokens = tokens[: room - 1]
        request = make_request(
            id, tokens, min(count, room - len(tokens)), arrival=self.engine.clock.now(), may_call=True, **fields
        )
        self.engine.add(request)
        self.requests[id], self.texts[id] = request, []
        if seconds is not None:
            report = self.engine.agent_event(CallStart(id, request.tenant, "tests", seconds, implicit=True))
            assert report.state == "announced"

    @rule(
        length=st.integers(1, 40), family=st.integers(0, 2), count=st.integers(1, 12), hints=HINTS, tenant=TENANTS,
        priority=st.sampled_from([0, 0, 5, -(2**31)]), retain=st.sampled_from([-1.0, -1.0, 20.0]),
        rate=st.sampled_from([4.0, 20.0]), seconds=SECONDS,
    )  # fmt: skip
    def ask(self, length, family, count, hints, tenant, priority, retain, rate, seconds) -> None:
        self.add(
            prompt(length, family), count, seconds, agent=hints, tenant=tenant, priority=priority,
            retain_seconds=retain, stream_rate=rate,
        )  # fmt: skip

    @precondition(lambda self: len(self.requests) > len(self.there()))
    @rule(
        data=st.data(), result=st.integers(1, 10), count=st.integers(1, 10), says=st.booleans(), hints=HINTS,
        edited=st.sampled_from([False, False, True]), seconds=SECONDS,
    )  # fmt: skip
    def go_on(self, data: st.DataObject, result, count, says, hints, edited, seconds) -> None:
        """The next request of a conversation, perhaps with a history that was changed."""
        id = data.draw(st.sampled_from([id for id in self.requests if id not in self.there()]))
        before = self.requests[id]
        history = before.tokens[: before.num_tokens].tolist()
        if edited:
            history[len(history) // 2] = 998
        self.add(
            history + prompt(result, 5), count, seconds, agent=hints, tenant=before.tenant, continues=id if says else ""
        )

    @precondition(lambda self: self.requests)
    @rule(
        data=st.data(), tenant=TENANTS, seconds=st.sampled_from([-1.0, 0.0, 0.5, 5.0, 1e9]), implicit=st.booleans(),
        tool=st.sampled_from(["", "tests", "web"]), fraction=st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
        stage=st.sampled_from(["", "a", "b", "c"]), kind=st.sampled_from("ssssspffc"),
    )  # fmt: skip
    def tell(self, data: st.DataObject, tenant, seconds, implicit, tool, fraction, stage, kind) -> None:
        known = st.sampled_from([*self.requests, "nobody"])
        id = data.draw(known)
        if id != "nobody" and data.draw(st.booleans()):
            tenant = self.requests[id].tenant
        match kind:
            case "s":
                stages = data.draw(st.sampled_from([(), ("a", "b")]))
                event = CallStart(id, tenant, tool, seconds, stages, implicit)
            case "p":
                event = CallProgress(id, tenant, stage, fraction)
            case "f":
                event = CallFinish(id, tenant, seconds)
            case _:
                event = Close(*data.draw(st.sampled_from([(id, tenant, ""), ("", tenant, "p"), ("", tenant, "")])))
        for _ in range(data.draw(st.integers(1, 2))):
            try:
                report = self.engine.agent_event(event)
            except RequestError as error:
                assert error.status in (400, 404, 409) and error.field
            else:
                assert report.remaining_seconds == -1 or report.remaining_seconds >= 0
                assert report.request in (id, "p")

    @rule(seconds=st.sampled_from([0.0, 0.0, 0.3, 3.0, 40.0]), steps=st.integers(1, 8), copy=st.booleans())
    def go_by(self, seconds: float, steps: int, copy: bool) -> None:
        self.engine.clock.advance(seconds)
        for _ in range(steps):
            self.note(step(self.engine, copy))

    @precondition(lambda self: self.engine.tiers is not None and self.engine.tiers.copier.queue)
    @rule(direction=st.sampled_from(Direction), fails=st.sampled_from([False, False, True]))
    def end_a_copy(self, direction: Direction, fails: bool) -> None:
        self.engine.tiers.copier.complete(direction, fail=fails)

    @precondition(lambda self: self.there())
    @rule(data=st.data())
    def vanish(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(self.there()))
        self.engine.cancel(id)
        self.cancelled.add(id)

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()
            assert sum(self.engine.block_states().values()) == self.engine.cache.pool.num_blocks


TestTinyAgents = TinyAgents.TestCase
TestTinyAgents.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("policy_name", POLICIES)
def test_two_that_each_have_half_on_the_host_do_not_lock_each_other_out(policy_name):
    """The reload deadlock: 20 blocks of 16 tokens; of 256 and of 160 tokens, 128 each are on the host only."""
    engine = make_engine(num_blocks=20, block_size=16, host_slots=64, token_budget=64, step=0.05)
    tiers = engine.tiers
    tiers.copier.job_seconds = 1e-3
    texts = {"a": prompt(256, 0), "b": prompt(160, 1)}
    for id, tokens in texts.items():
        engine.add(make_request(f"before {id}", tokens[:129], 1))
        finish(engine)
    engine.add(make_request("fills the device", prompt(319, 2), 1))
    finish(engine)
    while engine.settle():
        tiers.wait(0.0)
    engine.policy = POLICIES[policy_name](64)
    if policy_name == "agentic":
        engine.agents = AgentCalls(engine.cache, tiers)
    now, before = engine.clock.now(), engine.executor.computed_tokens
    requests = [make_request(id, tokens, 8, arrival=now, agent=AgentHints(agent=id)) for id, tokens in texts.items()]
    for request in requests:
        engine.add(request)
        assert engine.cache.lookup(request).tokens == 0 and tiers.loadable_tokens(request) == 128
    made = finish(engine)
    assert made == {id: continuation(tokens, 8) for id, tokens in texts.items()}
    loads = policy_name != "qoe-recompute"
    assert engine.counters.loads == 2 * loads
    assert (engine.executor.computed_tokens - before < 256 + 160) is loads


def conversation(engine: Engine, id: str, family: int, length: int = 24, count: int = 5, **fields: object) -> list[int]:
    """A turn that ends with a tool call of 100 s: its tokens."""
    tokens = prompt(length, family)
    request = make_request(id, tokens, count, arrival=engine.clock.now(), may_call=True, **fields)
    engine.add(request)
    engine.agent_event(CallStart(id, request.tenant, "tests", 100.0))
    return tokens + finish(engine)[id]


def test_what_is_held_is_found_though_others_fill_the_device():
    engine = agent_engine(num_blocks=20, host_slots=40)
    said = conversation(engine, "r", 0)
    report = engine.agent_event(CallStart("r", "", "tests"))
    assert (report.state, report.held_blocks) == ("kept", 7)
    engine.add(make_request("other", prompt(60, 1), 4, arrival=engine.clock.now()))
    finish(engine)
    assert engine.agent_event(CallStart("r", "", "tests")).state == "offloaded"
    assert engine.agents.held.counters.offloads == 1
    engine.add(make_request("next", said + prompt(4, 2), 4, arrival=engine.clock.now(), continues="r"))
    assert finish(engine)["next"] == continuation(said + prompt(4, 2), 4)
    assert engine.counters.loads == 1 and engine.agents.desk.counters.continued == 1
    let_time_end(engine)


@pytest.mark.parametrize("slots", [0, 3])
def test_without_room_on_the_host_what_is_held_gives_way(slots):
    engine = agent_engine(num_blocks=20, host_slots=slots)
    said = conversation(engine, "r", 0)
    engine.add(make_request("other", prompt(70, 1), 4, arrival=engine.clock.now()))
    assert finish(engine)["other"] == continuation(prompt(70, 1), 4)
    engine.add(make_request("next", said + prompt(4, 2), 4, arrival=engine.clock.now(), continues="r"))
    assert finish(engine)["next"] == continuation(said + prompt(4, 2), 4)
    let_time_end(engine)


def test_a_tool_that_never_returns_is_let_go_at_its_deadline():
    engine = agent_engine(num_blocks=20, host_slots=40)
    conversation(engine, "r", 0)
    while engine.settle():
        engine.tiers.wait(0.0)
    engine.clock.advance(399.0)
    engine.settle()
    assert engine.cache.pool.num_active == 7
    engine.clock.advance(2.0)
    engine.settle()
    assert engine.cache.pool.num_active == 0 and engine.agents.desk.counters.expired == 1
    assert engine.agent_event(CallFinish("r")).state == "dead"
    let_time_end(engine)


def test_an_edited_history_is_computed_again_and_ends_the_call():
    engine = agent_engine(num_blocks=40, host_slots=40)
    said = conversation(engine, "r", 0)
    edited = [*said[:6], 998, *said[7:], *prompt(5, 3)]
    engine.add(make_request("next", edited, 4, arrival=engine.clock.now(), continues="r"))
    request = engine.waiting[0]
    assert finish(engine)["next"] == continuation(edited, 4)
    assert request.cached_tokens == 4  # up to the edit
    assert not engine.agents.desk.calls
    let_time_end(engine)


def test_the_same_question_does_not_end_the_call_of_who_asked_it_before():
    """Only who also begins with the answer goes on from it."""
    engine = agent_engine(num_blocks=40)
    said = conversation(engine, "r", 0, length=25, count=2)  # the answer does not reach into a full block
    engine.add(make_request("again", prompt(25, 0), 2, arrival=engine.clock.now()))
    finish(engine)
    assert list(engine.agents.desk.calls) == ["r"] and not engine.agents.desk.calls["r"].finished
    engine.add(make_request("next", said + prompt(4, 2), 2, arrival=engine.clock.now()))
    finish(engine)
    assert not engine.agents.desk.calls and engine.agents.desk.counters.continued == 1
    let_time_end(engine)


def test_equal_conversations_are_gone_on_from_one_by_one():
    engine = agent_engine(num_blocks=60)
    said = conversation(engine, "r", 0)
    assert conversation(engine, "s", 0) == said
    for i in range(2):
        engine.add(make_request(f"next {i}", said + prompt(4 + i, 2 + i), 2, arrival=engine.clock.now()))
    finish(engine)
    assert engine.agents.desk.counters.continued == 2
    let_time_end(engine)


GREEDY = AgentHints("mine", importance=10, critical=True, remaining_seconds=0.0, depth=9, fan_out=9)


@pytest.mark.parametrize("like", ["agentic", "resident", "prefix-lru"])
def test_one_tenant_that_claims_everything_does_not_keep_others_out(like):
    """Calls that never end, and a full queue of most urgent requests at all times: another tenant runs before long."""
    engine = agent_engine(SETS[like], num_blocks=40, host_slots=20)
    for i in range(100):
        turn = make_request(f"held {i}", prompt(9, i % 3), 1, tenant="greedy", may_call=True)
        engine.agents.desk.note_added(turn, 0.0)
        engine.agents.ended(turn, 0.0, goes_on=True)
        engine.agent_event(CallStart(turn.id, "greedy", "tests", 1e6))
    engine.agents.tend(1.0)
    number = 0

    def crowd() -> None:
        nonlocal number
        while len(engine.waiting) < 8:
            number += 1
            engine.add(
                make_request(
                    f"g{number}", prompt(20, number % 7), 8, arrival=engine.clock.now(), tenant="greedy",
                    priority=-(2**31) if like == "agentic" else 0, agent=GREEDY,
                )
            )  # fmt: skip

    crowd()
    for _ in range(20):
        step(engine)
        crowd()
    modest = make_request("modest", prompt(20, 8), 8, arrival=engine.clock.now(), tenant="modest", agent=AgentHints())
    engine.add(modest)
    engine._check = False
    for _ in range(2000):
        made = step(engine)
        crowd()
        engine.clock.advance(0.5)
        if "modest" in made and modest.finish_reason is not None:
            break
    assert modest.finish_reason is not None, "starved"
