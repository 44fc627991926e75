"""Workloads of agents in rounds: a scenario and its knobs in, `SocietySpec`s out, every number of them fixed.

Everything is drawn here, once: lengths, who sees what in which order, who is late. Streams of their own for each
society, agent and purpose: more agents leave the lengths of the first ones as they were, more rounds leave all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from kvarn.simulation.rounds.scenarios import HISTORY, OUTPUT, Scenario, Span, find_scenario
from kvarn.simulation.workloads import WorkloadError

_HISTORY, _OUTPUT, _LATE, _SIGHT, _ORDER = range(5)
_NAMES = (
    "Ada", "Bram", "Cleo", "Dov", "Elin", "Femi", "Gus", "Hana", "Ivo", "Jun", "Kaya", "Lars", "Mina", "Nils", "Olga",
    "Pia", "Quin", "Rosa", "Sven", "Tara", "Uma", "Vito", "Wren", "Xenia", "Yara", "Zeno", "Anouk", "Boris", "Chloe",
    "Dario", "Esra", "Filip",
)  # fmt: skip


class Order(StrEnum):
    """In which order an agent reads what was said in the last round."""

    same = "same"
    """All read it in the order of the agents."""
    rotated = "rotated"
    """Each begins with another."""
    random = "random"


class HistoryStyle(StrEnum):
    """What an agent keeps."""

    rolling = "rolling"
    """Its memory, and a line on each of the last rounds: prompts stay about as long as they are."""
    append = "append"
    """All that it was ever told and has said, word for word."""


@dataclass(frozen=True)
class RoundWorkload:
    """What to draw. Lengths in tokens, durations in seconds."""

    scenario: str = "meet-and-greet"
    agents: int = 0
    """Of each society; 0: as many as the scenario has."""
    rounds: int = 5
    history: Span | None = None
    """Private memory at the start; None: what is usual of such a society. Likewise the next."""
    output: Span | None = None
    task_tokens: int = 24
    order: Order = Order.rotated
    visibility: float = 1.0
    """Share of the last round's outputs that an agent gets to see, at least one; which, is drawn for each."""
    stragglers: float = 0.0
    """Share of requests whose agent thinks before it sends them ..."""
    think_seconds: float = 1.0
    """... for so long on average, exponentially."""
    style: HistoryStyle = HistoryStyle.rolling
    summary_tokens: int = 16
    """Of the line on a round in a rolling history."""
    remembered: int = 8
    """Rounds that a rolling history has a line on at most; older lines leave it."""
    societies: int = 1
    qps: float = 0.0
    """Rounds a second in all: a society begins as soon as those before it have had time for theirs, and its rounds
    follow one another without pause. 0: all begin at once."""
    seed: int = 0

    def __post_init__(self) -> None:
        for field, least in (
            ("agents", 0), ("rounds", 1), ("task_tokens", 1), ("summary_tokens", 0), ("remembered", 0),
            ("societies", 1), ("seed", 0),
        ):  # fmt: skip
            if getattr(self, field) < least:
                raise WorkloadError(f"{field} is {getattr(self, field)}; expected at least {least}")
        if not 0 < self.visibility <= 1:
            raise WorkloadError(f"visibility is {self.visibility}; expected a share above 0, at most 1")
        if not 0 <= self.stragglers <= 1:
            raise WorkloadError(f"stragglers is {self.stragglers}; expected a share from 0 to 1")
        for field in ("think_seconds", "qps"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= 0):
                raise WorkloadError(f"{field} is {value}; expected a number from 0 on")
        for field in ("history", "output"):
            if getattr(self, field) is not None:
                getattr(self, field).checked(field)


@dataclass(frozen=True)
class AgentSpec:
    """One agent."""

    name: str
    history_tokens: int
    opening_tokens: int
    """Of the remark that the first round begins with."""


@dataclass(frozen=True)
class Turn:
    """One agent's part in one round."""

    sees: tuple[int, ...]
    """Whose outputs of the last round it reads, by index, in its order."""
    output_tokens: int
    think_seconds: float = 0.0
    """From the moment when the last outputs are there to its request."""


@dataclass(frozen=True)
class SocietySpec:
    """One society to come: sizes and times, not its words."""

    id: str
    arrival: float
    """Seconds after the workload starts."""
    scenario: Scenario
    agents: tuple[AgentSpec, ...]
    rounds: tuple[tuple[Turn, ...], ...]
    """A turn for each agent in each."""
    task_tokens: int
    style: HistoryStyle
    summary_tokens: int
    remembered: int

    def heard_tokens(self, round: int, agent: int) -> int:
        """Of what the others hear of an agent in this round: what it has said in the one before."""
        return self.rounds[round - 1][agent].output_tokens if round else self.agents[agent].opening_tokens

    @property
    def longest_context(self) -> int:
        """Of prompt and output of the longest request, about; labels of who speaks come on top."""
        appends, longest = self.style is HistoryStyle.append, 0
        for agent, spec in enumerate(self.agents):
            kept = spec.history_tokens
            for number, turns in enumerate(self.rounds):
                turn = turns[agent]
                heard = sum(self.heard_tokens(number, other) for other in turn.sees)
                context = kept + heard + self.task_tokens + turn.output_tokens
                longest = max(longest, context)
                if appends:
                    kept = context
                elif number < self.remembered:
                    kept += min(self.summary_tokens, turn.output_tokens)
        return longest


def draw_societies(workload: RoundWorkload) -> list[SocietySpec]:
    """The same workload, the same societies, in order of arrival. WorkloadError for a scenario that there is not."""
    scenario = find_scenario(workload.scenario)
    gap = workload.rounds / workload.qps if workload.qps else 0.0
    return [_society(workload, scenario, index, round(index * gap, 6)) for index in range(workload.societies)]


def agent_name(index: int) -> str:
    """Ada, Bram, ..., and when names run out Ada2, Bram2, ..."""
    turn, place = divmod(index, len(_NAMES))
    return _NAMES[place] + (str(turn + 1) if turn else "")


def _society(workload: RoundWorkload, scenario: Scenario, index: int, arrival: float) -> SocietySpec:
    count = workload.agents or scenario.agents
    draws = [_AgentDraws(workload, scenario, index, agent) for agent in range(count)]
    agents = tuple(
        AgentSpec(agent_name(agent), each.between(each.history, _HISTORY), each.between(each.output, _OUTPUT))
        for agent, each in enumerate(draws)
    )
    rounds = tuple(tuple(each.turn(count) for each in draws) for _ in range(workload.rounds))
    return SocietySpec(
        f"{scenario.name}-{index}", arrival, scenario, agents, rounds, workload.task_tokens, workload.style,
        workload.summary_tokens, workload.remembered,
    )  # fmt: skip


class _AgentDraws:
    """What is drawn for one agent of one society."""

    def __init__(self, workload: RoundWorkload, scenario: Scenario, society: int, agent: int) -> None:
        self.history = workload.history or HISTORY[scenario.society]
        self.output = workload.output or OUTPUT[scenario.society]
        self._workload = workload
        self._agent = agent
        self._streams = [np.random.default_rng([workload.seed, society, agent, purpose]) for purpose in range(5)]

    def between(self, span: Span, purpose: int) -> int:
        drawn: int = self._streams[purpose].integers(span.low, span.high + 1).item()
        return drawn

    def turn(self, agents: int) -> Turn:
        """The next one."""
        late = self._streams[_LATE]
        thinks, seconds = late.random() < self._workload.stragglers, late.exponential(self._workload.think_seconds)
        return Turn(self._sees(agents), self.between(self.output, _OUTPUT), round(float(seconds), 6) if thinks else 0.0)

    def _sees(self, agents: int) -> tuple[int, ...]:
        wanted = max(1, round(self._workload.visibility * agents))
        seen = sorted(self._streams[_SIGHT].choice(agents, wanted, replace=False).tolist())
        if self._workload.order is Order.random:
            seen = self._streams[_ORDER].permutation(seen).tolist()
        elif self._workload.order is Order.rotated:
            first = self._agent % wanted
            seen = seen[first:] + seen[:first]
        return tuple(seen)
