"""Agents on a real model, its memory and the copying thread: whatever is moved while tools run, no token changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig

from kvarn.serving.agent_calls import AgentCalls
from kvarn.serving.agents.events import CallFinish, CallStart, Close
from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.agents.lifecycle import CallState
from kvarn.serving.assemble import LoadedEngine, load_engine
from kvarn.serving.assemble_tiers import build_tiers
from kvarn.serving.batch import Batch, SampledToken
from kvarn.serving.clock import VirtualClock
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.serving.executors.torch_executor import TorchExecutor
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.policies.fcfs import FirstComeFirstServed
from kvarn.serving.policies.registry import make_policy
from kvarn.serving.request import Request
from kvarn.serving.sampling.params import SamplingParams
from tests.models.tiny import SIZES, save_model

MIB = 2**20
SIZE = 8
ANSWER = 12
AGENTS = 5
"""Of conversations of up to 16 blocks, on 30."""


class Timed:
    """An executor that takes 5 ms of a virtual clock for each token: to compute again costs more than to copy."""

    def __init__(self, executor: TorchExecutor, clock: VirtualClock) -> None:
        self.executor, self.clock = executor, clock
        self.add, self.remove = executor.add, executor.remove

    def execute(self, batch: Batch) -> list[list[SampledToken]]:
        self.clock.advance(5e-3 * batch.num_tokens)
        return self.executor.execute(batch)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedEngine:
    folder: Path = tmp_path_factory.mktemp("tiny")
    save_model(LlamaConfig(**SIZES), folder)
    return load_engine(
        EngineConfig(
            model=str(folder), precision="float32", max_context=256, block_size=SIZE, kv_memory_bytes=4 * MIB,
            threads=1, speculation="off",
        )
    )  # fmt: skip


def engine_on(loaded: LoadedEngine, *, blocks: int, tiers: bool) -> Engine:
    config = EngineConfig(
        policy="agentic", policy_options=("allowance=0.6",), host_memory_bytes=8 * MIB, block_size=SIZE
    )
    executor, clock = loaded.engine.executor, VirtualClock()
    cache = KVCache(blocks, SIZE)
    host = build_tiers(config, cache, executor.kv, loaded.spec, loaded.folder) if tiers else None
    engine = Engine(
        Timed(executor, clock), make_policy(config) if tiers else FirstComeFirstServed(), cache, clock, tiers=host,
        token_budget=64, max_running=8, max_context=256, vocab_size=loaded.spec.vocab_size,
        agents=AgentCalls(cache, host) if tiers else None,
    )  # fmt: skip
    engine._check = True
    return engine


def question(agent: int) -> list[int]:
    """Two agents of each pair share a prefix."""
    shared = [3 + (agent // 2 * 31 + i * 7) % 190 for i in range(40)]
    return shared + [3 + (agent * 53 + i * 11) % 190 for i in range(24)]


def result(agent: int) -> list[int]:
    return [3 + (agent * 17 + i * 5) % 190 for i in range(10)]


def request(id: str, tokens: list[int], now: float, **fields: object) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)
    return Request.create(id, tokens, params, arrival=now, may_call=True, **fields)  # type: ignore[arg-type]


def answers(engine: Engine, texts: dict[str, list[int]], until: Callable[[], bool] | None = None) -> None:
    """Step, real copies ending meanwhile, until something is so; else until there is no work."""
    for _ in range(3000):
        if until() if until is not None else not engine.has_work:
            return
        engine.clock.advance(0.02)
        for emission in engine.step():
            assert emission.error is None
            if emission.token is not None:
                texts.setdefault(emission.request.id, []).append(emission.token)
        engine.settle()
    raise AssertionError("it does not come about")


@pytest.fixture(scope="module")
def alone(loaded: LoadedEngine) -> dict[str, list[int]]:
    """What each conversation becomes on an engine without tiers, by itself."""
    texts: dict[str, list[int]] = {}
    for agent in range(AGENTS):
        engine = engine_on(loaded, blocks=60, tiers=False)
        tokens = question(agent)
        for turn in ("a", "b"):
            engine.add(request(f"{turn}{agent}", tokens, engine.clock.now()))
            answers(engine, texts)
            tokens = tokens + texts[f"{turn}{agent}"] + result(agent)
    return texts


AFTER = {"early": 1.0, "in time": 8.0, "late": 30.0, "while it leaves": 12.0}
"""Seconds that a tool takes of which 8 were forecast; half a second later the next request comes."""


@pytest.mark.parametrize("when", AFTER)
def test_two_turns_with_a_tool_between_are_what_they_are_alone(loaded, alone, when: str) -> None:
    engine, texts = engine_on(loaded, blocks=30, tiers=True), {}
    desk, tiers = engine.agents.desk, engine.tiers
    hints = AgentHints(agent="coder")
    for agent in range(AGENTS):
        engine.add(request(f"a{agent}", question(agent), engine.clock.now(), agent=hints))
        engine.agent_event(CallStart(f"a{agent}", "", "tests", 8.0))
    returned = set()

    def go_on(id: str) -> None:
        agent = int(id[1:])
        tokens = question(agent) + texts[id] + result(agent)
        engine.add(request(f"b{agent}", tokens, engine.clock.now(), agent=hints, continues=id))
        returned.add(id)

    def all_is_done() -> bool:
        now = engine.clock.now()
        for call in list(desk.calls.values()):
            if call.id in returned:
                continue
            age, leaves = now - call.started, call.state is CallState.OFFLOADING
            if age > AFTER[when] and not call.finished:
                engine.agent_event(CallFinish(call.id))
            if age > AFTER[when] + 0.5 or (leaves and when == "while it leaves"):
                go_on(call.id)
        return len(returned) == AGENTS and not engine.has_work

    answers(engine, texts, all_is_done)
    assert texts == alone
    held = engine.agents.held.counters
    assert desk.counters.continued == AGENTS and held.offloads > 0
    if when != "while it leaves":
        assert engine.counters.loads + held.uploads > 0 and tiers.counters.read_blocks > 0
    if when == "in time":
        assert held.uploads > 0
    all_gone(engine)


@pytest.mark.parametrize("state", [state for state in CallState if state not in (CallState.RELEASED, CallState.DEAD)])
def test_a_conversation_closed_in_any_state_harms_nobody(loaded, alone, state: CallState) -> None:
    """One agent is closed when its KV is there; the others' answers stay what they are."""
    engine, texts = engine_on(loaded, blocks=30, tiers=True), {}
    desk = engine.agents.desk
    for agent in range(AGENTS):
        engine.add(request(f"a{agent}", question(agent), 0.0))
        engine.agent_event(CallStart(f"a{agent}", "", "tests", 4.0))
    closed, returned = [], set()

    def all_is_done() -> bool:
        now = engine.clock.now()
        for call in list(desk.calls.values()):
            if call.state is state and not closed:
                engine.agent_event(Close(call.id))
                closed.append(call.id)
            elif now - call.started > 5.0 and not call.finished:
                engine.agent_event(CallFinish(call.id))
            elif now - call.started > 5.5 and call.id not in returned:
                agent = int(call.id[1:])
                tokens = question(agent) + texts[call.id] + result(agent)
                engine.add(request(f"b{agent}", tokens, now, continues=call.id))
                returned.add(call.id)
        return len(returned) + len(closed) >= AGENTS and not engine.has_work and not desk.calls

    answers(engine, texts, all_is_done)
    assert texts == {id: text for id, text in alone.items() if f"a{id[1:]}" not in closed or id[0] == "a"}
    assert closed or state in (CallState.RESERVING, CallState.OFFLOADING, CallState.UPLOADING)  # too short to be seen
    all_gone(engine)


def all_gone(engine: Engine) -> None:
    assert not list(engine.agents.held) and engine.cache.pool.num_active == 0
    while engine.settle():
        engine.tiers.wait(0.1)
    assert engine.cache.pool.num_active == 0
    assert engine.tiers.host.num_available == engine.tiers.host.num_slots
    engine.close()
