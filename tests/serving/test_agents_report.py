"""What is told of agents: every call once, where its KV is, and nothing that is over."""

from __future__ import annotations

from kvarn.serving.agent_calls import AgentCalls
from kvarn.serving.agents.events import CallFinish, CallStart
from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.agents_report import agent_stats, report_agents
from kvarn.serving.api.messages import AgentsReport, AgentStats, EngineStats, NodeReport
from kvarn.serving.engine import Engine

from .paged_text import make_engine, make_request, run
from .virtual_serving import prompt


def agent_engine() -> Engine:
    engine = make_engine()
    engine.agents = AgentCalls(engine.cache, engine.tiers)
    return engine


def report(engine: Engine, limit: int = 10) -> AgentsReport:
    return report_agents(engine, EngineStats(), limit)


def nodes(engine: Engine) -> dict[str, NodeReport]:
    return {node.name: node for program in report(engine).programs for node in program.nodes}


def stats(engine: Engine) -> AgentStats:
    told = agent_stats(engine)
    assert told is not None
    return told


def test_a_call_is_told_from_its_request_to_the_one_that_goes_on_from_it():
    engine = agent_engine()
    hints = AgentHints(program="p", agent="coder", node="code", after=("plan",), critical=True)
    engine.add(make_request("a", prompt(20, 0), 4, agent=hints))
    assert nodes(engine)["code"].state == "waiting"
    tokens = run(engine)["a"]
    assert nodes(engine)["code"].state == "ended" and nodes(engine)["code"].blocks == 0
    engine.agent_event(CallStart("a", tool="tests", seconds=8.0))
    node = nodes(engine)["code"]
    assert (node.state, node.tool, node.hints) == ("calling", "tests", hints)
    assert node.call is not None and node.call.state == "kept"
    assert (node.blocks, node.device_blocks, node.call.held_blocks) == (6, 5, 5)  # the last token was not computed
    assert report(engine).blocks["stalled"] == 5
    assert (stats(engine).calls, stats(engine).held_blocks, stats(engine).started) == ({"kept": 1}, 5, 1)
    engine.clock.advance(6.0)
    node = nodes(engine)["code"]
    assert node.call is not None and node.call.elapsed_seconds == 6.0
    assert node.age >= 6.0 and node.tokens == 24
    engine.agent_event(CallFinish("a"))
    engine.clock.advance(2.0)
    node = nodes(engine)["code"]
    assert node.state == "answered"
    assert node.call is not None and node.call.elapsed_seconds == 6.0  # what it took
    assert (stats(engine).forecasts, stats(engine).forecast_error_seconds) == (1, 2.0)
    engine.add(make_request("b", prompt(20, 0) + tokens, 4, continues="a"))
    assert nodes(engine)["b"].state == "waiting"
    run(engine)
    assert nodes(engine)["code"].state == "ended" and report(engine).blocks["stalled"] == 0
    assert (stats(engine).calls, stats(engine).continued) == ({}, 1)


def test_a_client_that_names_nothing_is_a_program_of_its_own():
    engine = agent_engine()
    engine.add(make_request("a", prompt(20, 0), 4, may_call=True))
    run(engine)
    assert report(engine).programs == []  # nobody knows yet that it is an agent's
    engine.agent_event(CallStart("a", tool="search", implicit=True))
    (program,) = report(engine).programs
    assert (program.id, [node.name for node in program.nodes]) == ("a", ["a"])
    engine.add(make_request("kept", prompt(20, 1), 4, may_call=True, retain_seconds=30.0))
    run(engine)
    assert nodes(engine)["kept"].state == "retained"


def test_programs_with_something_going_on_come_first_then_who_was_seen_last():
    engine = agent_engine()
    for number in range(4):
        hints = AgentHints(program=f"p{number}")
        engine.add(make_request(f"r{number}", prompt(12, number), 2, agent=hints))
        run(engine)
        engine.clock.advance(1.0)
    engine.agent_event(CallStart("r1", tool="tests"))
    assert [program.id for program in report(engine).programs] == ["p1", "p3", "p2", "p0"]
    assert [program.id for program in report(engine, limit=2).programs] == ["p1", "p3"]


def test_a_call_that_never_ends_is_let_go_of_by_an_idle_engine():
    engine = agent_engine()
    engine.add(make_request("a", prompt(20, 0), 4, may_call=True))
    run(engine)
    engine.agent_event(CallStart("a", tool="tests", seconds=1.0))
    assert not engine.settle() and stats(engine).held_blocks == 5
    engine.clock.advance(61.0)  # the shortest deadline is a minute
    engine.settle()
    assert stats(engine).held_blocks == 0 and stats(engine).expired == 1
    engine.check()


def test_without_agents_there_is_nothing_to_tell():
    engine = make_engine()
    assert agent_stats(engine) is None
    assert report(engine) == AgentsReport(EngineStats(), {}, [])
