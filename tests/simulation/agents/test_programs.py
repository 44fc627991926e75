"""Programs: drawn the same every time, kept in files, and asked for in an order that their graphs allow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.serving.agents.hints import UNKNOWN
from kvarn.simulation.agents.apps import APPS, DATA_SETS
from kvarn.simulation.agents.programs import ModelNode, ProgramSpec, ToolNode, read_programs, write_programs
from kvarn.simulation.agents.progress import Ask, ProgramRun, Run, Texts
from kvarn.simulation.agents.tools import LogNormalDuration, PoissonDuration
from kvarn.simulation.agents.workload import AgentWorkload, Forecasts, Guess, draw_programs, with_forecasts
from kvarn.simulation.workloads import WorkloadError

TEXTS = Texts(100, 1000)


@pytest.mark.parametrize("app", APPS)
@pytest.mark.parametrize("data_set", DATA_SETS)
def test_the_same_workload_has_the_same_programs(app: str, data_set: str) -> None:
    workload = AgentWorkload(app, data_set, programs=6, seed=3)
    specs = draw_programs(workload)
    assert specs == draw_programs(workload)
    assert specs != draw_programs(replace(workload, seed=4))
    assert specs[:4] == draw_programs(replace(workload, programs=4)), "more programs leave the first ones as they were"


def test_other_durations_leave_lengths_and_rounds_as_they_were() -> None:
    def lengths(specs: list[ProgramSpec]) -> list[object]:
        return [
            (node.name, node.own_tokens, node.output_tokens) if isinstance(node, ModelNode) else node.result_tokens
            for spec in specs
            for node in spec.nodes
        ]

    usual = draw_programs(AgentWorkload(programs=5))
    slow = draw_programs(AgentWorkload(programs=5, durations=PoissonDuration(60.0)))
    assert lengths(usual) == lengths(slow)
    assert sum(tool.seconds for spec in slow for tool in spec.tool_nodes) > 30 * len(slow[0].tool_nodes)


def test_code_writer_is_about_as_large_as_the_authors_port_of_it() -> None:
    """27 model calls a program and 239 output tokens a call."""
    specs = draw_programs(AgentWorkload("code-writer", "d1", programs=200))
    calls = [node for spec in specs for node in spec.model_nodes]
    assert len(calls) / len(specs) == pytest.approx(27, rel=0.1)
    assert np.mean([node.output_tokens for node in calls]) == pytest.approx(239, rel=0.1)
    assert {node.result_tokens for spec in specs for node in spec.tool_nodes} == {128}
    assert len({len(spec.nodes) for spec in specs}) == 3, "its loop goes round one to three times"


def test_programs_survive_a_file(tmp_path: Path) -> None:
    specs = [*draw_programs(AgentWorkload(programs=3)), *draw_programs(AgentWorkload("deep-research", programs=2))]
    write_programs(specs, tmp_path / "frozen" / "programs.jsonl")
    assert read_programs(tmp_path / "frozen" / "programs.jsonl") == specs


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no program"),
        ("{", "line 1"),
        ('{"id": "a"}', "line 1"),
        ('{"id": "a", "arrival": 0, "app": "", "nodes": [{"name": "x"}]}', "line 1"),
        ('{"id": "a", "arrival": 0, "app": "", "nodes": [{"name": "t", "kind": "git"}]}', "model call that makes it"),
        (
            '{"id": "a", "arrival": 0, "app": "", "nodes": [{"name": "m", "agent": "", "own_tokens": 1, '
            '"after": ["n"]}]}',
            "not before it",
        ),
    ],
)
def test_a_file_of_something_else_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "programs.jsonl"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=said):
        read_programs(path)


def test_a_model_call_makes_one_tool_call_at_most() -> None:
    caller = ModelNode("m", "m", own_tokens=1)
    with pytest.raises(WorkloadError, match="two tool calls"):
        ProgramSpec("a", 0.0, "", (caller, ToolNode("s", "git", ("m",)), ToolNode("t", "git", ("m",))))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(APPS)), st.integers(0, 50), st.randoms(use_true_random=False))
def test_every_node_starts_once_and_after_all_that_it_waits_for(app: str, seed: int, random: object) -> None:
    """Law: in whatever order nodes end, each is asked once, when its parents have ended, with their words in it."""
    (spec,) = draw_programs(AgentWorkload(app, programs=1, seed=seed, token_scale=0.05))
    run, nodes = ProgramRun(spec, TEXTS), {node.name: node for node in spec.nodes}
    pending, ended, outputs = run.start(), {}, {}
    prompts: dict[str, np.ndarray] = {}
    while pending:
        action = pending.pop(random.randrange(len(pending)))  # type: ignore[attr-defined]
        node = nodes[action.node]
        assert action.node not in ended
        assert all(other in ended for other in node.after)
        ended[action.node] = True
        if isinstance(action, Run):
            assert isinstance(node, ToolNode)
            assert (action.caller, action.seconds) == (node.caller, node.seconds)
            pending += run.returned(action.node)
            continue
        assert isinstance(action, Ask) and isinstance(node, ModelNode)
        prompts[action.node] = action.prompt
        if action.continues:
            before = np.concatenate([prompts[action.continues], outputs[action.continues]])
            assert np.array_equal(action.prompt[: len(before)], before), "a conversation only grows"
        outputs[action.node] = np.arange(action.output_tokens, dtype=np.int32) + 7
        pending += run.answered(action.node, outputs[action.node])
    assert run.done
    assert set(ended) == set(nodes)
    assert {node: output for node, (_, output) in run.work().items()} == {
        node.name: node.output_tokens for node in spec.model_nodes
    }


def test_agents_of_a_role_share_their_instructions_in_all_programs_and_nothing_else() -> None:
    first, second = draw_programs(AgentWorkload(programs=2))
    prompts = [ask.prompt for spec in (first, second) for ask in ProgramRun(spec, TEXTS).start()]
    shared = first.model_nodes[0].system_tokens
    assert np.array_equal(prompts[0][:shared], prompts[1][:shared])
    assert not np.array_equal(prompts[0][shared : shared + 50], prompts[1][shared : shared + 50])


def test_what_nothing_waits_for_is_refused() -> None:
    (spec,) = draw_programs(AgentWorkload(programs=1))
    run = ProgramRun(spec, TEXTS)
    with pytest.raises(ValueError, match="nothing waits for"):
        run.answered("architect", [1])
    run.start()
    with pytest.raises(ValueError, match="does not run"):
        run.returned("look_up")
    run.answered("architect", [1])
    run.returned("look_up")
    with pytest.raises(ValueError, match="does not run"):
        run.returned("look_up")


def predicted(specs: list[ProgramSpec]) -> np.ndarray:
    return np.array([tool.predicted_seconds for spec in specs for tool in spec.tool_nodes])


def test_forecasts_are_off_by_no_more_than_their_error_and_bias() -> None:
    law = LogNormalDuration()
    specs = draw_programs(AgentWorkload(programs=20, durations=law))
    actual = np.array([tool.seconds for spec in specs for tool in spec.tool_nodes])
    assert np.array_equal(predicted(with_forecasts(specs, Forecasts(Guess.actual), law)), actual)
    off = predicted(with_forecasts(specs, Forecasts(Guess.actual, error=2.0), law)) / actual
    assert 1 / 3 <= off.min() < 0.4 and 2.5 < off.max() <= 3
    assert np.median(off) == pytest.approx(1, rel=0.15)
    low = predicted(with_forecasts(specs, Forecasts(Guess.actual, bias=-0.5), law)) / actual
    assert low == pytest.approx(0.5)
    silent = with_forecasts(specs, Forecasts(Guess.none), law)
    assert set(predicted(silent)) == {UNKNOWN}
    assert {node.hints.tool_seconds for spec in silent for node in spec.model_nodes} == {UNKNOWN}


def test_what_a_request_says_of_its_tool_is_what_the_call_says() -> None:
    for spec in draw_programs(AgentWorkload(programs=4, forecasts=Forecasts(error=0.5))):
        tools = {tool.caller: tool for tool in spec.tool_nodes}
        for node in spec.model_nodes:
            tool = tools.get(node.name)
            said = (node.hints.tool, node.hints.tool_seconds)
            assert said == ((tool.kind, tool.predicted_seconds) if tool else ("", UNKNOWN))
            assert node.hints.program == spec.id


@pytest.mark.parametrize("fields", [{"error": -0.1}, {"bias": -1.0}, {"error": float("nan")}])
def test_forecasts_that_make_no_sense_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(WorkloadError):
        Forecasts(**fields)
