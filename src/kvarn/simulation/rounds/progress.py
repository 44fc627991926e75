"""What a society does next: answers in, requests out. Neither clock nor sockets; a player has those.

    run = SocietyRun(spec, texts)
    run.start()                  -> [Ask]   the first round, one request an agent
    run.answered(agent, tokens)  -> [Ask]   the next round, when that was the last answer of this one

A prompt is the agent's private history, what it sees of the last round's outputs, and a task. Each part is made into
tokens on its own, and what an agent has said is, token for token, what the others read: a shared part is the same
wherever it stands. Where histories append, a prompt is the last one with the answer and new parts behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvarn.serving.rounds.hints import RoundHint, Segment, SegmentKind
from kvarn.simulation.rounds.texts import RoundTexts, Tokens
from kvarn.simulation.rounds.workload import HistoryStyle, SocietySpec


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A stretch of a prompt."""

    kind: SegmentKind
    tokens: Tokens
    id: str = ""
    """Of what is shared: round and speaker."""


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """Send a request."""

    society: str
    round: int
    agent: int
    """Its index."""
    hint: RoundHint
    parts: tuple[Part, ...]
    output_tokens: int
    think_seconds: float
    """To wait before it is sent."""

    @property
    def prompt(self) -> Tokens:
        """All parts; shape (tokens,)."""
        return np.concatenate([part.tokens for part in self.parts])

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What a server is told of the parts."""
        return tuple(Segment(part.kind, len(part.tokens), part.id) for part in self.parts)


class SocietyRun:
    """One society under way."""

    def __init__(self, spec: SocietySpec, texts: RoundTexts) -> None:
        self.spec = spec
        self.round = 0
        """The one that is under way."""
        self._texts = texts
        self._kept: list[tuple[Part, ...]] = [
            (Part("private", texts.history(spec, agent)),) for agent in range(len(spec.agents))
        ]
        """What each agent's prompts begin with."""
        self._lines: list[list[Tokens]] = [[] for _ in spec.agents]
        self._heard = self._shared([texts.opening(spec, agent) for agent in range(len(spec.agents))], "opening")
        """What was said in the last round, by agent."""
        self._asked: dict[int, Ask] = {}
        self._said: dict[int, Tokens] = {}

    @property
    def done(self) -> bool:
        return self.round == len(self.spec.rounds)

    def start(self) -> list[Ask]:
        """The requests of the first round."""
        return self._begin()

    def answered(self, agent: int, tokens: Sequence[int] | Tokens, told: Tokens | None = None) -> list[Ask]:
        """An agent has said `tokens`; `told` is what the others read, where that is something else.

        Without tokens it counts as a silence, beyond what was asked for they are cut. ValueError for an agent that
        was not asked.
        """
        if agent not in self._asked or agent in self._said:
            raise ValueError(f"society {self.spec.id}: an answer of agent {agent}, which nothing waits for")
        said = np.asarray(tokens, dtype=np.int32)[: self._asked[agent].output_tokens]
        if not len(said):
            said = self._texts.silence()
        self._remember(agent, said)
        self._said[agent] = said if told is None else told
        if len(self._said) < len(self._asked):
            return []
        self._heard = self._shared([self._said[index] for index in range(len(self.spec.agents))], f"{self.round}")
        self._asked, self._said = {}, {}
        self.round += 1
        return [] if self.done else self._begin()

    def _begin(self) -> list[Ask]:
        asks = [self._ask(agent) for agent in range(len(self.spec.agents))]
        self._asked = dict(enumerate(asks))
        return asks

    def _ask(self, agent: int) -> Ask:
        spec, turn = self.spec, self.spec.rounds[self.round][agent]
        lines = self._lines[agent][-spec.remembered :] if spec.remembered else []
        kept = self._kept[agent]
        if lines:
            kept = (*kept[:-1], Part("private", np.concatenate([kept[-1].tokens, *lines])))
        task = Part("task", self._texts.task(spec, agent, self.round))
        hint = RoundHint(f"{spec.id}/{self.round}", len(spec.agents), spec.agents[agent].name)
        parts = (*kept, *(self._heard[other] for other in turn.sees), task)
        return Ask(spec.id, self.round, agent, hint, parts, turn.output_tokens, turn.think_seconds)

    def _remember(self, agent: int, said: Tokens) -> None:
        if self.spec.style is HistoryStyle.append:
            *parts, task = self._asked[agent].parts
            self._kept[agent] = (*parts, Part("private", np.concatenate([task.tokens, said])))
        elif self.spec.summary_tokens:
            line = np.concatenate([self._texts.note(self.spec, self.round), said])
            self._lines[agent].append(line[: self.spec.summary_tokens])

    def _shared(self, outputs: Sequence[Tokens], when: str) -> list[Part]:
        names = [agent.name for agent in self.spec.agents]
        return [
            Part("shared", np.concatenate([self._texts.speaker(self.spec, index), output]), f"{when}/{names[index]}")
            for index, output in enumerate(outputs)
        ]
