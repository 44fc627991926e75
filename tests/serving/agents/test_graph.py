"""Graphs of applications: what follows from one, by hand and as laws on random ones; loops; JSON; every error."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.errors import KvarnError
from kvarn.serving.agents.graph import Graph, Plan
from kvarn.serving.agents.hints import UNKNOWN, AgentHints
from kvarn.serving.agents.nodes import DEFAULT_SECONDS, KINDS


def diamond() -> Graph:
    """start (1) -> slow (5), fast (2) -> end (3)."""
    graph = Graph("diamond")
    graph.llm("start")
    graph.llm("slow", after=["start"], seconds=5, importance=7)
    graph.llm("fast", after=["start"], seconds=2)
    graph.llm("end", after=["slow", "fast"], seconds=3)
    return graph


def code_writer(rounds: int = 3) -> Graph:
    """The application of the paper's evaluation."""
    graph = Graph("code-writer")
    graph.llm("architect", seconds=10)
    graph.call("web_search", "search", after=["architect"], predict_time=3)
    graph.llm("design", agent="architect", continues="architect", after=["web_search"], seconds=10)
    graph.llm("judge", after=["design"], seconds=2)
    graph.loop("judge", "architect", rounds)
    for i in (1, 2, 3):
        graph.llm(f"programmer {i}", agent="programmer", after=["judge"], seconds=4 + i)
        graph.call(f"file search {i}", "file_query", after=[f"programmer {i}"])
        graph.llm(f"code {i}", agent="programmer", continues=f"programmer {i}", after=[f"file search {i}"], seconds=8)
        graph.call(f"write {i}", "file_write", after=[f"code {i}"])
        graph.add_edge(f"write {i}", "checker")
        graph.add_edge(f"write {i}", "reviewer")
    graph.llm("checker", seconds=3)
    graph.call("external test", "external_test", after=["checker"])
    graph.llm("verdict", agent="checker", continues="checker", after=["external test"], seconds=1)
    graph.llm("reviewer", seconds=6)
    for i in (1, 2, 3):
        graph.llm(f"reviser {i}", agent="reviser", after=["verdict", "reviewer"], seconds=5)
    graph.llm("final", after=[f"reviser {i}" for i in (1, 2, 3)], seconds=4)
    graph.call("write", "file_write", after=["final"])
    return graph


def test_a_diamond_by_hand():
    plan = diamond().plan()
    assert list(plan.nodes) == ["start", "slow", "fast", "end"]
    assert plan.total_seconds == 9
    assert {n.name: n.remaining_seconds for n in plan.nodes.values()} == {"start": 9, "slow": 8, "fast": 5, "end": 3}
    assert [n.name for n in plan.nodes.values() if n.critical] == ["start", "slow", "end"]
    assert [(n.depth, n.remaining_depth) for n in plan.nodes.values()] == [(1, 2), (2, 1), (2, 1), (3, 0)]
    assert [(n.fan_in, n.fan_out) for n in plan.nodes.values()] == [(0, 2), (1, 1), (1, 1), (2, 0)]
    assert [n.join for n in plan.nodes.values()] == ["", "end", "end", ""]
    assert plan.nodes["end"].parents == ("slow", "fast")
    assert plan.hints("slow", "run 1") == AgentHints(
        program="run 1", agent="slow", node="slow", after=("start",), depth=2, fan_in=1, fan_out=1,
        remaining_seconds=8, total_seconds=9, critical=True, join="end", importance=7,
    )  # fmt: skip


def test_code_writer_by_hand():
    plan = code_writer().unrolled({("judge", "architect"): 1}).plan()
    # architect 10, search 3, design 10, judge 2 | programmer 7, query, code 8, write | checker 3, test, verdict 1
    # | reviser 5 | final 4, write.
    query, write, test = (KINDS[kind].seconds for kind in ("file_query", "file_write", "external_test"))
    assert plan.total_seconds == pytest.approx(25 + 15 + query + write + 4 + test + 5 + 4 + write)
    critical = {name for name, node in plan.nodes.items() if node.critical}
    assert {"programmer 3", "checker", "external test", "reviser 1", "write"} <= critical
    assert not {"programmer 1", "reviewer"} & critical
    hints = plan.hints("programmer 2", "run")
    assert (hints.agent, hints.depth, hints.fan_out, hints.tool) == ("programmer", 5, 1, "file_query")
    assert hints.tool_seconds == UNKNOWN, "nobody said; the server knows the kind and learns"
    assert plan.hints("checker", "run").after == ("code 1", "code 2", "code 3"), "no server sees the writing"
    assert plan.hints("reviser 1", "run").after == ("verdict", "reviewer")
    assert plan.hints("architect", "run").tool_seconds == 3
    assert plan.nodes["architect"].tool == "web_search"
    assert plan.nodes["programmer 2"].tool_seconds == query
    assert plan.nodes["code 2"].tool == "", "nobody goes on with its conversation after the file is written"
    assert {plan.nodes[f"reviser {i}"].join for i in (1, 2, 3)} == {"final"}
    assert plan.nodes["checker"].join == "", "what it meets, three nodes wait for"
    assert plan.nodes["final"].remaining_depth == 1


def test_a_branch_waits_for_its_join_from_its_first_node():
    graph = Graph("research")
    graph.llm("planner")
    for i in (1, 2):
        graph.llm(f"searcher {i}", after=["planner"])
        graph.call(f"search {i}", "search", after=[f"searcher {i}"])
        graph.llm(f"summary {i}", continues=f"searcher {i}", after=[f"search {i}"])
        graph.add_edge(f"summary {i}", "answer")
    graph.llm("answer")
    nodes = graph.plan().nodes
    assert {nodes[name].join for name in ("searcher 1", "search 1", "summary 2")} == {"answer"}
    assert nodes["planner"].join == nodes["answer"].join == ""


def test_continuing_is_an_edge_unless_a_way_leads_there_already():
    graph = Graph("talk")
    graph.llm("question")
    graph.llm("answer", continues="question")
    graph.call("look", after=["answer"])
    graph.llm("more", continues="answer", after=["look"])
    nodes = graph.plan().nodes
    assert nodes["answer"].parents == ("question",)
    assert nodes["more"].parents == ("look",)


def test_the_slowest_of_several_tools_is_the_one_waited_for():
    graph = Graph("tools")
    graph.llm("ask")
    graph.call("quick", "file_read", after=["ask"])
    graph.call("slow", "search", after=["ask"])
    graph.call("log", "data_analysis", after=["ask"])
    graph.llm("go on", continues="ask", after=["quick", "slow"])
    plan = graph.plan()
    assert (plan.nodes["ask"].tool, plan.nodes["ask"].tool_seconds) == ("slow", KINDS["search"].seconds)
    assert plan.nodes["log"].stages == KINDS["data_analysis"].stages


def test_kinds_are_open():
    graph = Graph("g")
    graph.call("deploy")
    node = graph.plan().nodes["deploy"]
    assert (node.kind, node.seconds, node.is_call, node.agent) == ("deploy", DEFAULT_SECONDS, True, "")


def test_rounds_of_a_loop_follow_each_other_and_what_comes_after_waits_for_the_last():
    plan = code_writer(rounds=2).plan()
    nodes = plan.nodes
    assert nodes["architect#2"].parents == ("judge",)
    assert nodes["judge#2"].parents == ("design#2",)
    assert nodes["programmer 1"].parents == ("judge#2",)
    assert nodes["judge"].children == ("architect#2",)
    assert nodes["design#2"].continues == "architect#2"
    assert nodes["architect#2"].continues == ""
    assert nodes["architect#2"].agent == "architect"
    assert nodes["architect#2"].tool == "web_search#2"
    assert plan.hints("architect#2", "").tool == "search"
    assert (nodes["judge"].depth, nodes["judge#2"].depth) == (4, 8)
    once = code_writer(rounds=2).unrolled({("judge", "architect"): 1}).plan()
    assert plan.total_seconds == pytest.approx(once.total_seconds + 25)


def test_a_model_that_calls_tools_until_it_calls_none():
    graph = Graph("agent")
    graph.llm("model", continues="model")
    graph.call("tools", after=["model"])
    graph.llm("summary", after=["model"])
    graph.loop("tools", "model", rounds=3, until="model")
    nodes = graph.plan().nodes
    assert list(nodes) == ["model", "tools", "model#2", "tools#2", "model#3", "summary"]
    assert [nodes[f"model{n}"].continues for n in ("", "#2", "#3")] == ["", "model", "model#2"]
    assert [nodes[f"model{n}"].tool for n in ("", "#2", "#3")] == ["tools", "tools#2", ""]
    assert nodes["summary"].parents == ("model#3",)
    assert list(graph.unrolled({("tools", "model"): 1}).plan().nodes) == ["model", "summary"]


def test_inner_loops_turn_in_every_round_of_the_outer():
    graph = Graph("nested")
    graph.llm("plan", continues="check")
    graph.llm("try", continues="try", after=["plan"])
    graph.llm("check", after=["try"])
    graph.loop("try", "try", rounds=2)
    graph.loop("check", "plan", rounds=2)
    nodes = graph.plan().nodes
    assert list(nodes) == ["plan", "try", "try#2", "check", "plan#2", "try#3", "try#4", "check#2"]
    assert [n.continues for n in nodes.values()] == ["", "", "try", "", "check", "try#2", "try#3", ""]
    assert all(n.fan_in == 1 for n in list(nodes.values())[1:])


def test_two_loops_back_to_one_node():
    graph = Graph("supervisor")
    graph.llm("supervisor")
    graph.llm("a", after=["supervisor"])
    graph.llm("b", after=["supervisor"])
    graph.loop("a", "supervisor", 2, until="supervisor")
    graph.loop("b", "supervisor", 2, until="supervisor")
    nodes = graph.plan().nodes
    assert "supervisor#2" in nodes and nodes["supervisor"].depth == 1
    assert all(n.parents for n in list(nodes.values())[1:])


def random_graph(draw: st.DrawFn) -> Graph:
    """A connected DAG: every node but the first comes after some that were added before it."""
    graph = Graph("random")
    for i in range(draw(st.integers(1, 12))):
        after = [f"n{j}" for j in draw(st.sets(st.integers(0, i - 1), min_size=1, max_size=4))] if i else []
        if draw(st.booleans()):
            graph.call(f"n{i}", draw(st.sampled_from([*KINDS, "other"])), after=after)
        else:
            models = [name for name in after if name in _models(graph)]
            continues = draw(st.sampled_from(["", *models]))
            graph.llm(f"n{i}", after=after, continues=continues, seconds=draw(st.floats(0, 100)))
    return graph


def _models(graph: Graph) -> set[str]:
    return {node["name"] for node in json.loads(graph.to_json())["nodes"] if node["type"] == "llm"}


graphs = st.composite(random_graph)()


def ways(plan: Plan, to: str) -> list[list[str]]:
    """Every way from a first node to this one."""
    parents = plan.nodes[to].parents
    return [[*way, to] for parent in parents for way in ways(plan, parent)] if parents else [[to]]


@given(graphs)
def test_laws_of_any_plan(graph: Graph):
    """Laws: parents come first; depth and total are those of the longest way; a rank is no less than a child's; the
    critical nodes make a way as long as the whole."""
    plan = graph.plan()
    seen: set[str] = set()
    for node in plan.nodes.values():
        assert seen >= set(node.parents)
        seen.add(node.name)
        to_here = ways(plan, node.name)
        assert node.depth == max(map(len, to_here))
        assert all(node.remaining_seconds >= plan.nodes[child].remaining_seconds for child in node.children)
        assert all(node.remaining_depth > plan.nodes[child].remaining_depth for child in node.children)
        assert all(node.name in plan.nodes[child].parents for child in node.children)
    ends = [way for node in plan.nodes.values() if not node.children for way in ways(plan, node.name)]
    longest = max(ends, key=lambda way: sum(plan.nodes[name].seconds for name in way))
    assert math.isclose(sum(plan.nodes[name].seconds for name in longest), plan.total_seconds, rel_tol=1e-9)
    assert all(plan.nodes[name].critical for name in longest)


@given(graphs, st.data())
def test_laws_of_loops(graph: Graph, data: st.DataObject):
    """Laws: n rounds have n copies of every node of the body, of one agent; one round is the graph without the loop."""
    straight = graph.plan()
    last = data.draw(st.sampled_from(list(straight.nodes)))
    first = data.draw(st.sampled_from(sorted({name for way in ways(straight, last) for name in way})))
    body = {name for way in ways(straight, last) if first in way for name in way[way.index(first) :]}
    rounds = data.draw(st.integers(1, 3))
    graph.loop(last, first, 3)
    unrolled = graph.unrolled({(last, first): rounds})
    plan = unrolled.plan()
    assert len(plan.nodes) == len(straight.nodes) + (rounds - 1) * len(body)
    for name in body:
        copies = [name, *(f"{name}#{n}" for n in range(2, rounds + 1))]
        assert len({(plan.nodes[copy].agent, plan.nodes[copy].kind) for copy in copies}) == 1
        depths = [plan.nodes[copy].depth for copy in copies]
        assert depths == sorted(set(depths))
    if rounds == 1:
        assert plan == straight


@given(graphs)
def test_json_there_and_back(graph: Graph):
    graph.loop("n0", "n0", 2)
    again = Graph.from_json(graph.to_json())
    assert again.to_json() == graph.to_json()
    assert again.plan() == graph.plan()


def _graph(build) -> Graph:
    graph = Graph("g")
    graph.llm("a")
    build(graph)
    return graph


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda g: g.llm("b", after=["c"]), r"no node 'c', which the edge from 'c' to 'b' names; it has 'a', 'b'"),
        (lambda g: g.add_edge("a", "z"), "no node 'z'"),
        (lambda g: g.llm("a"), "two nodes 'a'"),
        (lambda g: g.llm(""), "empty name"),
        (lambda g: (g.llm("b", after="a"), g.add_edge("b", "a")), r"cycle: (a -> b -> a|b -> a -> b).*loop\("),
        (lambda g: g.add_edge("a", "a"), "cycle: a -> a"),
        (lambda g: g.llm("b"), "Nothing reaches node 'a'"),
        (lambda g: g.llm("b", continues="x"), "no node 'x', which continues of 'b'"),
        (lambda g: (g.call("f", after=["a"]), g.llm("b", continues="f")), "'b' continues 'f', which is a function"),
        (
            lambda g: (g.llm("b", continues="c"), g.llm("c", after=["b"])),
            "'b' continues 'c', which does not end before",
        ),
        (lambda g: g.llm("b", after="a", continues="b"), "'b' continues 'b', which does not end before"),
        (lambda g: g.llm("b", seconds=-1), "'b' has seconds=-1"),
        (lambda g: g.llm("b", seconds=math.nan), "'b' has seconds=nan"),
        (lambda g: g.llm("b", importance=11), "'b' has importance 11"),
        (lambda g: g.call("f", predict_time=-0.5), "'f' has predict_time=-0.5"),
        (lambda g: g.call("f", stages=["x", "x"]), "'f' has stages"),
        (lambda g: g.loop("a", "a", 0), "rounds=0"),
        (lambda g: (g.loop("a", "a", 2), g.loop("a", "a", 3)), "loop from 'a' to 'a' already"),
        (lambda g: g.loop("a", "q", 2), "no node 'q', which the loop from 'a' to 'q'"),
        (lambda g: (g.llm("b", after=["a"]), g.loop("a", "b", 2)), "loop from 'a' to 'b' goes back to a node"),
        (lambda g: (g.llm("b", after=["a"]), g.loop("a", "a", 2, until="b")), "until='b', which is not between"),
        (lambda g: g.unrolled({("b", "a"): 1}), "no loop from 'b' to 'a'"),
        (lambda g: (g.loop("a", "a", 2), g.unrolled({("a", "a"): 3})), "3 rounds of the loop"),
        (lambda g: g.plan().hints("zz", ""), "no node 'zz'; it has 'a'"),
        (lambda g: (g.call("f", after="a"), g.plan().hints("f", "")), "'f' is a function call"),
    ],
)
def test_errors_name_the_node_and_the_fix(build, says):
    with pytest.raises(KvarnError, match=says):
        _graph(build).plan()


def test_an_empty_graph_is_refused():
    with pytest.raises(KvarnError, match="'g' has no node; add one"):
        Graph("g").plan()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda form: form["nodes"][0].update(seconds="long"), r"\$\.nodes\[0\]\.seconds"),
        (lambda form: form["nodes"][1].update(type="dream"), r"dream.*\$\.nodes\[1\]\.type"),
        (lambda form: form["nodes"][0].update(color="red"), "color"),
        (lambda form: form["nodes"][0].update(seconds=-2), "'start' has seconds=-2"),
        (lambda form: form["nodes"].append(form["nodes"][0]), "two nodes 'start'"),
        (lambda form: form["edges"].append(["start"]), r"\$\.edges"),
        (lambda form: form["loops"].append({"last": "end", "first": "start"}), "rounds"),
        (lambda form: form.pop("name"), "name"),
    ],
)
def test_bad_json_names_the_field(change, says):
    form = json.loads(diamond().to_json())
    change(form)
    with pytest.raises(KvarnError, match=says):
        Graph.from_json(json.dumps(form))


def test_what_is_no_json_is_refused():
    with pytest.raises(KvarnError, match="not a graph"):
        Graph.from_json("{")
