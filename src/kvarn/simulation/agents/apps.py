"""The two applications of the paper's evaluation, as graphs, and how long what their agents read and say is.

Code-Writer: an architect looks things up on the web and designs; a judge may send the design back; three programmers,
each with a file search; their code, written to files; a checker with two external tools and a reviewer; three revisers;
a last agent that writes the files. Deep Research: a planner with a web search; three searchers, each with a search or a
data analysis, and a summary of each; a reflector that may start another round; text and, with an image tool, a picture;
the answer. Every agent that waits for a tool goes on with its conversation afterwards.

Source: TokenCake (arXiv 2510.18586), section 6.1, for what is drawn. The paper gives no lengths but their sources;
the authors' later port has 27 model calls, 239 output tokens a call and tool results of 128 tokens on average, which D1
comes near to. Which of a role's calls are longer than others is our guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from kvarn.serving.agents.graph import Graph
from kvarn.simulation.workloads import Fixed, Lengths, LogNormal, WorkloadError

_TOKEN_SECONDS = 0.03
"""What a developer expects of an output token."""
_BRANCHES = (1, 2, 3)

Expected = Callable[[str], float]
"""Kind of a tool -> the seconds that a developer expects of it."""


@dataclass(frozen=True)
class DataSet:
    """How long texts are. Tokens."""

    name: str
    system: Lengths
    """A role's instructions."""
    task: Lengths
    output: Lengths
    mean_output: float
    result: Lengths
    """What a tool gives back."""
    own: Lengths
    """What a single call is told."""


_CHAT = DataSet(
    "d1",
    system=LogNormal(600, 0.4, 200, 2000),
    task=LogNormal(500, 0.8, 32, 4000),
    output=LogNormal(200, 0.6, 16, 1200),
    mean_output=239,
    result=Fixed(128),
    own=Fixed(24),
)
"""Short questions and answers of a few hundred tokens, as in ShareGPT."""
_CODE = DataSet(
    "d2",
    system=LogNormal(1000, 0.4, 400, 3000),
    task=LogNormal(2000, 0.7, 200, 10000),
    output=LogNormal(380, 0.6, 32, 2000),
    mean_output=450,
    result=Fixed(128),
    own=Fixed(24),
)
"""A repository's files in the prompt and whole functions in the answer, as in AgentCode."""
DATA_SETS = {data.name: data for data in (_CHAT, _CODE)}


@dataclass(frozen=True)
class App:
    """An application: its graph, for given seconds of an average model call and of its tools."""

    name: str
    graph: Callable[[float, Expected], Graph]
    again: float
    """Chance that a loop goes round once more, while it may."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """How much longer than average what a node says is; 1 where it is not named."""

    def weight(self, node: str) -> float:
        """Of a node in any round and any branch."""
        return self.weights.get(node.split("#")[0].split(".")[0], 1.0)

    def instance(self, expected: Expected, mean_output: float, rng: np.random.Generator) -> Graph:
        """One program's graph: loops go round as often as is drawn."""
        graph = self.graph(_TOKEN_SECONDS * mean_output, expected)
        rounds = {}
        for loop in graph.loops:
            count = 1
            while count < loop.rounds and rng.random() < self.again:
                count += 1
            rounds[loop.last, loop.first] = count
        return graph.unrolled(rounds)


def code_writer(seconds: float, expected: Expected) -> Graph:
    """24 model calls and 10 tool calls; each further round of the judge has 3 and 1 more, 2 rounds at most."""
    graph = Graph("code-writer")
    llm, call = _pens(graph, _CODE_WRITER_WEIGHTS, seconds, expected)
    llm("architect", "architect", continues="design")
    call("look_up", "search", "architect")
    llm("design", "architect", ("look_up",), continues="architect")
    llm("judge", "judge", ("design",), continues="judge")
    graph.loop("judge", "architect", rounds=3)
    for k in _BRANCHES:
        llm(f"programmer.{k}", "programmer", ("design", "judge"))
        call(f"find.{k}", "file_query", f"programmer.{k}")
        llm(f"approach.{k}", "programmer", (f"find.{k}",), continues=f"programmer.{k}")
        llm(f"code.{k}", "coder", (f"approach.{k}",))
        call(f"save.{k}", "file_write", f"code.{k}")
        llm(f"saved.{k}", "coder", (f"save.{k}",), continues=f"code.{k}")
    code = tuple(f"{name}.{k}" for k in _BRANCHES for name in ("code", "saved"))
    llm("checker", "checker", code)
    call("run_tests", "external_test", "checker")
    llm("tested", "checker", ("run_tests",), continues="checker")
    call("run_linter", "external_test", "tested")
    llm("verdict", "checker", ("run_linter",), continues="tested")
    llm("reviewer", "reviewer", code)
    for k in _BRANCHES:
        llm(f"reviser.{k}", "reviser", (f"code.{k}", "verdict", "reviewer"))
    llm("final", "final", tuple(f"reviser.{k}" for k in _BRANCHES))
    call("write_files", "file_write", "final")
    llm("done", "final", ("write_files",), continues="final")
    return graph


def deep_research(seconds: float, expected: Expected) -> Graph:
    """16 model calls and 5 tool calls; a further round of the reflector has 11 and 3 more."""
    graph = Graph("deep-research")
    llm, call = _pens(graph, _DEEP_RESEARCH_WEIGHTS, seconds, expected)
    llm("planner", "planner")
    call("look_up", "search", "planner")
    llm("outline", "planner", ("look_up",), continues="planner")
    for k, kind in zip(_BRANCHES, ("search", "search", "data_analysis"), strict=True):
        llm(f"searcher.{k}", "searcher", ("outline",))
        call(f"search.{k}", kind, f"searcher.{k}")
        llm(f"found.{k}", "searcher", (f"search.{k}",), continues=f"searcher.{k}")
        llm(f"summary.{k}", "summary", (f"found.{k}",))
    summaries = tuple(f"summary.{k}" for k in _BRANCHES)
    llm("reflector", "reflector", summaries, continues="reflector")
    graph.loop("reflector", "outline", rounds=2)
    llm("text", "text generation", ("reflector", *summaries))
    llm("image", "image generation", ("reflector",))
    call("draw", "image_generation", "image")
    llm("picture", "image generation", ("draw",), continues="image")
    llm("answer", "answer", ("text", "picture"))
    return graph


def _pens(
    graph: Graph, weights: Mapping[str, float], seconds: float, expected: Expected
) -> tuple[Callable[..., None], Callable[[str, str, str], None]]:
    """What draws a model call (name, agent, after, continues) and what draws the tool call (name, kind) of one."""

    def llm(name: str, agent: str, after: tuple[str, ...] = (), continues: str = "") -> None:
        weight = weights.get(name.split(".")[0], 1.0)
        graph.llm(name, agent=agent, after=after, continues=continues, seconds=weight * seconds)

    def call(name: str, kind: str, caller: str) -> None:
        graph.call(name, kind, after=[caller], predict_time=expected(kind))

    return llm, call


_CODE_WRITER_WEIGHTS = {"architect": 0.8, "design": 1.5, "judge": 0.8, "programmer": 0.6, "code": 1.8, "saved": 0.4,
                        "checker": 0.6, "tested": 0.6, "reviser": 1.5, "final": 1.5, "done": 0.4}  # fmt: skip
_DEEP_RESEARCH_WEIGHTS = {"planner": 0.6, "searcher": 0.5, "found": 1.2, "text": 1.8, "image": 0.5, "picture": 0.5,
                          "answer": 1.5}  # fmt: skip

APPS = {
    "code-writer": App("code-writer", code_writer, again=0.5, weights=_CODE_WRITER_WEIGHTS),
    "deep-research": App("deep-research", deep_research, again=0.35, weights=_DEEP_RESEARCH_WEIGHTS),
}


def find_app(name: str) -> App:
    """WorkloadError where there is none of this name."""
    if name not in APPS:
        raise WorkloadError(f"application is {name!r}; expected one of {', '.join(APPS)}")
    return APPS[name]


def find_data_set(name: str) -> DataSet:
    """WorkloadError where there is none of this name."""
    if name not in DATA_SETS:
        raise WorkloadError(f"data set is {name!r}; expected one of {', '.join(DATA_SETS)}")
    return DATA_SETS[name]
