"""What a program does next: ends of its nodes in, what to start out. Neither clock nor sockets; a player has those.

    run = ProgramRun(spec, texts)
    run.start()                  -> [Ask]         the first model calls
    run.answered(node, tokens)   -> [Ask | Run]   a model call has ended with these tokens
    run.returned(node)           -> [Ask | Run]   a tool has answered

A node starts once, when all that it is after have ended. The prompt of a model call is its role's instructions, the
program's task, what each node before it said, and a few words of its own; where it continues a conversation, that
conversation, word for word, stands in place of instructions and task. So a conversation only grows: its KV is a prefix
of what follows. What is said is drawn from seeds, but outputs, which are the server's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvarn.serving.agents.hints import AgentHints
from kvarn.simulation.agents.programs import ModelNode, Node, ProgramSpec, ToolNode
from kvarn.simulation.prompts import mixed_tokens

Tokens = NDArray[np.int32]


class Events(StrEnum):
    """What a server hears of tool calls."""

    explicit = "explicit"
    """Start with an estimate, and end."""
    implicit = "implicit"
    """What a server could see by itself: that an answer ended in a call of this tool, and the request that goes on."""
    none = "none"


class Words(Protocol):
    """Makes texts; what a symbol stands for is the player's affair."""

    def tokens(self, name: str, count: int) -> Tokens:
        """A text of `count` tokens; the same name, the same text."""
        ...


@dataclass(frozen=True, slots=True)
class Texts:
    """Makes token ids from what a text is called: the same name, the same text."""

    low: int
    """The least id used."""
    high: int
    """One above the greatest."""

    def tokens(self, name: str, count: int) -> Tokens:
        """Shape (count,)."""
        seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        made: Tokens = mixed_tokens(np.full(count, seed, dtype=np.uint64), self.high - self.low)
        made += self.low
        return made


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """Send a model call."""

    node: str
    agent: str
    prompt: Tokens
    output_tokens: int
    hints: AgentHints
    continues: str = ""
    """The model call (a node) whose conversation goes on; empty: none."""
    answers: bool = False
    """Whether it brings the results of a tool call which that one made."""


@dataclass(frozen=True, slots=True)
class Run:
    """Run a tool for so many seconds."""

    node: str
    kind: str
    seconds: float
    predicted_seconds: float
    stages: tuple[str, ...]
    caller: str
    """The model call that made it."""


Action = Ask | Run


class ProgramRun:
    """One program under way."""

    def __init__(self, spec: ProgramSpec, texts: Words) -> None:
        self.spec = spec
        self._texts = texts
        self._nodes: dict[str, Node] = {node.name: node for node in spec.nodes}
        self._missing = {node.name: len(_waits_for(node)) for node in spec.nodes}
        self._children: dict[str, list[str]] = {name: [] for name in self._nodes}
        for node in spec.nodes:
            for other in _waits_for(node):
                self._children[other].append(node.name)
        self._prompts: dict[str, Tokens] = {}
        self._outputs: dict[str, Tokens] = {}
        self._returned: set[str] = set()

    @property
    def done(self) -> bool:
        return len(self._outputs) + len(self._returned) == len(self._nodes)

    def start(self) -> list[Action]:
        """What begins at once."""
        return [self._action(node) for node in self.spec.nodes if not self._missing[node.name]]

    def answered(self, node: str, tokens: Sequence[int] | Tokens) -> list[Action]:
        """A model call has ended: what begins now. ValueError for one that was not asked, or that has ended."""
        if node not in self._prompts or node in self._outputs:
            raise ValueError(f"program {self.spec.id}: an answer to {node!r}, which nothing waits for")
        self._outputs[node] = np.asarray(tokens, dtype=np.int32)
        return self._ended(node)

    def returned(self, node: str) -> list[Action]:
        """A tool has answered: what begins now. ValueError for one that does not run."""
        if self._missing.get(node) or not isinstance(self._nodes.get(node), ToolNode) or node in self._returned:
            raise ValueError(f"program {self.spec.id}: a result of {node!r}, which does not run")
        self._returned.add(node)
        return self._ended(node)

    def work(self) -> dict[str, tuple[int, int]]:
        """Node -> (prompt tokens, output tokens) of every model call that has ended."""
        return {node: (len(self._prompts[node]), len(output)) for node, output in sorted(self._outputs.items())}

    def digest(self) -> str:
        """Equal for two runs that did the same work: the same calls of the same lengths, on texts of the same seeds."""
        parts = [self.spec.id, str(self.spec.seed), *sorted(self._returned)]
        parts += [f"{node} {prompt} {output}" for node, (prompt, output) in self.work().items()]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def _ended(self, name: str) -> list[Action]:
        ready = []
        for child in self._children[name]:
            self._missing[child] -= 1
            if not self._missing[child]:
                ready.append(self._action(self._nodes[child]))
        return ready

    def _action(self, node: Node) -> Action:
        if isinstance(node, ToolNode):
            return Run(node.name, node.kind, node.seconds, node.predicted_seconds, node.stages, node.caller)
        prompt = self._prompts[node.name] = self._prompt(node)
        tools = [other for name in node.after if isinstance(other := self._nodes[name], ToolNode)]
        answers = any(tool.caller == node.continues for tool in tools)
        return Ask(node.name, node.agent, prompt, node.output_tokens, node.hints, node.continues, answers)

    def _prompt(self, node: ModelNode) -> Tokens:
        spec, texts = self.spec, self._texts
        if node.continues:
            parts = [self._prompts[node.continues], self._outputs[node.continues]]
        else:
            parts = [
                texts.tokens(f"{spec.seed} instructions {spec.app} {node.agent}", node.system_tokens),
                texts.tokens(f"{spec.seed} task {spec.id}", node.task_tokens),
            ]
        parts += [self._said(other) for other in node.after if other != node.continues]
        parts.append(texts.tokens(f"{spec.seed} own {spec.id} {node.name}", node.own_tokens))
        return np.concatenate(parts)

    def _said(self, name: str) -> Tokens:
        node = self._nodes[name]
        if isinstance(node, ModelNode):
            return self._outputs[name]
        return self._texts.tokens(f"{self.spec.seed} result {self.spec.id} {name}", node.result_tokens)


def _waits_for(node: Node) -> tuple[str, ...]:
    continues = node.continues if isinstance(node, ModelNode) else ""
    return node.after if not continues or continues in node.after else (*node.after, continues)
