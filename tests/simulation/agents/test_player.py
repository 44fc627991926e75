"""Programs on a simulated engine: the same every time, the same work under every policy, and times that add up."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.simulation.agents.player import play_programs
from kvarn.simulation.agents.progress import Events
from kvarn.simulation.agents.report import AgentRun, BlockSeries
from kvarn.simulation.agents.tools import parse_law
from kvarn.simulation.agents.workload import AgentWorkload, draw_programs
from kvarn.simulation.assemble import simulated_engine
from kvarn.simulation.workloads import Burst, Poisson

A100, QWEN = load_accelerator("a100-80"), load_model_shape("qwen2.5-14b")
SPECS = draw_programs(AgentWorkload(programs=4, arrivals=Poisson(1.0), token_scale=0.25))


def make_engine(kv_tokens: int = 12_000, **fields: object) -> Engine:
    usual = {"kv_memory_bytes": int(kv_tokens * QWEN.kv_bytes_per_token()), "speculation": "off", "max_running": 64}
    engine = simulated_engine(EngineConfig(**(usual | fields)), A100, QWEN)  # type: ignore[arg-type]
    engine._check = True
    return engine


@pytest.fixture(scope="module")
def played() -> AgentRun:
    return play_programs(make_engine(), SPECS)


def test_a_run_is_the_same_every_time(played: AgentRun) -> None:
    again = play_programs(make_engine(), SPECS)
    assert again.to_json() == played.to_json()


@pytest.mark.parametrize(
    ("policy", "events"),
    [("fcfs-conservative", Events.explicit), ("streaming", Events.explicit), *(("agentic", each) for each in Events)],
)
def test_every_policy_does_the_same_work(policy: str, events: Events, played: AgentRun) -> None:
    engine = make_engine(6000, policy=policy, host_memory_bytes=10 * 2**30)
    run = play_programs(engine, SPECS, events=events, hints=events is not Events.none)
    assert run.work() == played.work()
    assert run.summary()["output_tokens"] == sum(node.output_tokens for spec in SPECS for node in spec.model_nodes)
    assert not run.refused
    if engine.agents is not None:
        assert not engine.agents.held and not engine.agents.desk.calls, "nothing is held for programs that have ended"
    assert engine.cache.pool.num_active == 0


def test_nodes_begin_when_what_they_wait_for_has_ended(played: AgentRun) -> None:
    ends = {(call.program, call.node): call.end for call in played.calls}
    ends |= {(tool.program, tool.node): tool.end for tool in played.tools}
    begins = {(call.program, call.node): call.ready for call in played.calls}
    begins |= {(tool.program, tool.node): tool.start for tool in played.tools}
    for spec in SPECS:
        for node in spec.nodes:
            latest = max((ends[spec.id, other] for other in node.after), default=spec.arrival)
            assert begins[spec.id, node.name] == latest
    for call in played.calls:
        assert call.ready < call.first_token <= call.end
    for record in played.programs:
        assert record.end == max(end for (program, _), end in ends.items() if program == record.id)


def test_tools_take_the_time_that_the_programs_say(played: AgentRun) -> None:
    wanted = {(spec.id, tool.name): tool.seconds for spec in SPECS for tool in spec.tool_nodes}
    took = {(tool.program, tool.node): tool.end - tool.start for tool in played.tools}
    assert took == pytest.approx(wanted)


def test_what_continues_a_conversation_finds_its_kv_where_there_is_room() -> None:
    run = play_programs(make_engine(20_000), SPECS[:1])
    calls = {(call.program, call.node): call for call in run.calls}
    for spec in SPECS[:1]:
        for node in spec.model_nodes:
            if node.continues:
                before = calls[spec.id, node.continues]
                held = before.prompt_tokens + before.output_tokens - 1
                assert calls[spec.id, node.name].cached_tokens >= held - held % 16 - 16


def test_blocks_add_up_to_the_pool_in_every_sample(played: AgentRun) -> None:
    columns = played.blocks.columns()
    total = sum(columns[name] for name in columns if name not in ("times", "waiting"))
    assert set(total) == {float(make_engine().cache.pool.num_blocks)}
    assert sum(played.blocks.mean_blocks().values()) == pytest.approx(total[0])


def test_blocks_are_averaged_over_the_time_in_which_somebody_waits() -> None:
    series = BlockSeries(interval_seconds=0.5)
    for now, waiting, active in ((0.0, 0, 1), (0.1, 5, 9), (1.0, 2, 3), (2.0, 1, 5), (4.0, 0, 7)):
        states = {"active": active}
        series.note(SimpleNamespace(waiting=range(waiting), block_states=lambda states=states: states), now)
    assert list(series.columns()["waiting"]) == [0, 2, 1, 0]
    assert series.mean_blocks()["active"] == pytest.approx((1 * 1 + 1 * 3 + 2 * 5) / 4)
    assert series.mean_blocks(contended=True)["active"] == pytest.approx((1 * 3 + 2 * 5) / 3)


def test_a_program_whose_request_is_refused_fails_and_the_others_go_on() -> None:
    first = SPECS[1].nodes[0]
    huge = replace(SPECS[1], nodes=(replace(first, system_tokens=10**6), *SPECS[1].nodes[1:]))  # type: ignore[call-arg]
    run = play_programs(make_engine(), [SPECS[0], huge, *SPECS[2:]])
    assert {record.id for record in run.programs if record.error} == {SPECS[1].id}
    assert len(run.done) == len(SPECS) - 1
    assert run.summary()["failures"] == {"refused: context_length_exceeded": 1}


def test_turns_are_a_role_with_its_tools_and_slow_ones_are_abnormal() -> None:
    specs = draw_programs(
        AgentWorkload(programs=3, arrivals=Burst(0.0), token_scale=0.1, durations=parse_law("fixed:1"))
    )
    slow = specs[0]
    nodes = tuple(replace(node, seconds=50.0) if node.name == "write_files" else node for node in slow.nodes)
    run = play_programs(make_engine(20_000), [replace(slow, nodes=nodes), *specs[1:]])
    finals = [turn for turn in run.turns() if turn.agent == "final"]
    assert sorted(turn.tool_seconds for turn in finals) == pytest.approx([1, 1, 50])
    assert all(turn.seconds > turn.tool_seconds for turn in finals)
    assert run.abnormal()["final"] == 1
    assert run.abnormal(tools=False)["final"] == 0
    assert run.summary()["agent_seconds"]["final"] == pytest.approx(sum(turn.seconds for turn in finals) / 3)
