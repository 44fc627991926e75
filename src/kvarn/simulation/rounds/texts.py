"""What agents are told, as token ids: random ones for an engine that reads nothing, a scenario's text for a model.

Both are the same for the same society, agent and round, and have the lengths that the society says. What agents say is
theirs, so none of it is made here, but for the remarks that a first round begins with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvarn.simulation.prompts import mixed_tokens
from kvarn.simulation.rounds.workload import SocietySpec
from kvarn.simulation.workloads import WorkloadError

Tokens = NDArray[np.int32]


class RoundTexts(Protocol):
    """Makes the texts of societies; all shapes are (tokens,)."""

    def history(self, spec: SocietySpec, agent: int) -> Tokens:
        """Who the agent is and what it remembers: `history_tokens`."""
        ...

    def opening(self, spec: SocietySpec, agent: int) -> Tokens:
        """What it has said before the first round: `opening_tokens`."""
        ...

    def speaker(self, spec: SocietySpec, agent: int) -> Tokens:
        """What stands before its words where others read them; may be nothing."""
        ...

    def note(self, spec: SocietySpec, round: int) -> Tokens:
        """What stands before an agent's own words where it remembers them; may be nothing."""
        ...

    def task(self, spec: SocietySpec, agent: int, round: int) -> Tokens:
        """What it is asked now: `task_tokens`."""
        ...

    def silence(self) -> Tokens:
        """Stands for an answer that has no tokens."""
        ...


class SeededTexts:
    """Token ids from `low` to below `high` that mean nothing. Another `seed`, other texts throughout.

    All histories begin with the same few tokens, as prompts do that a chat template or a system prompt begins.
    """

    def __init__(self, low: int, high: int, seed: int = 0) -> None:
        self._low, self._high, self._seed = low, high, seed

    def named(self, name: str, count: int) -> Tokens:
        """The same name, the same text: of two lengths, one begins the other."""
        digest = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=8).digest()
        seeds = np.full(count, int.from_bytes(digest, "little"), dtype=np.uint64)
        return mixed_tokens(seeds, self._high - self._low) + np.int32(self._low)

    def history(self, spec: SocietySpec, agent: int) -> Tokens:
        tokens = self.named(f"{spec.id} history {agent}", spec.agents[agent].history_tokens)
        tokens[:_TEMPLATE_TOKENS] = self.named("template", _TEMPLATE_TOKENS)[: len(tokens)]
        return tokens

    def opening(self, spec: SocietySpec, agent: int) -> Tokens:
        return self.named(f"{spec.id} opening {agent}", spec.agents[agent].opening_tokens)

    def speaker(self, spec: SocietySpec, agent: int) -> Tokens:
        return _NOTHING

    def note(self, spec: SocietySpec, round: int) -> Tokens:
        return _NOTHING

    def task(self, spec: SocietySpec, agent: int, round: int) -> Tokens:
        return self.named(f"{spec.id} task {agent} {round}", spec.task_tokens)

    def silence(self) -> Tokens:
        return np.array([self._low], dtype=np.int32)


class Frame(NamedTuple):
    """What stands around the parts of a prompt, for models made for conversations."""

    before: str = ""
    """The history, and counted to it; likewise the next."""
    between: str = ""
    """History and what was said."""
    behind: str = ""
    """The task, and counted to it: then the model speaks."""


CHATML = Frame("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
"""Of SmolLM2-Instruct, Qwen2.5-Instruct and others."""


class ScenarioTexts:
    """English, made of the scenario's lines and a few of its own. `encode` makes token ids of a text, no BOS.

    With a frame each prompt is a conversation of one question; a rolling history's notes then stand behind `between`.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]], seed: int = 0, frame: Frame = Frame()) -> None:
        self._encode, self._seed, self._frame = encode, seed, frame

    def history(self, spec: SocietySpec, agent: int) -> Tokens:
        """Cut at the end: a memory may break off. WorkloadError where the frame leaves no room."""
        name, about = spec.agents[agent].name, spec.scenario
        draw = self._stream(spec, agent, "history")
        trade, habit = draw.choice(_TRADES), draw.choice(_HABITS)
        head = f"You are {name}, {trade}. {name} {habit}. The place is {about.place}; {about.occasion}.\nMemories:\n"
        before, between = self._tokens(self._frame.before), self._tokens(self._frame.between)
        room = spec.agents[agent].history_tokens - len(before) - len(between)
        if room < 1:
            raise WorkloadError(
                f"a history of {spec.agents[agent].history_tokens} tokens; expected more than the "
                f"{len(before) + len(between)} of what stands around it"
            )
        return np.concatenate([before, self._cut(head, self._memories(spec, draw), room), between])

    def opening(self, spec: SocietySpec, agent: int) -> Tokens:
        draw = self._stream(spec, agent, "opening")
        remarks = (f" {draw.choice(spec.scenario.news)} {draw.choice(_ASIDES)}" for _ in iter(int, 1))
        return self._cut("", remarks, spec.agents[agent].opening_tokens)

    def speaker(self, spec: SocietySpec, agent: int) -> Tokens:
        return self._tokens(f"\n{spec.agents[agent].name}:")

    def note(self, spec: SocietySpec, round: int) -> Tokens:
        return self._tokens(f"\n- In round {round + 1} I said:")

    def task(self, spec: SocietySpec, agent: int, round: int) -> Tokens:
        """Cut at the front: it ends with the agent's turn to speak."""
        name, questions = spec.agents[agent].name, spec.scenario.questions
        turn = f" You are {name}.{self._frame.behind}" if self._frame.behind else f"\n{name}:"
        end = self._tokens(f"\n\nRound {round + 1}. {questions[round % len(questions)]} Be brief.{turn}")
        draw = self._stream(spec, agent, f"task {round}")
        if len(end) < spec.task_tokens:
            asides = (f" {draw.choice(_ASIDES)}" for _ in iter(int, 1))
            end = np.concatenate([self._cut("\n", asides, spec.task_tokens - len(end)), end])
        return end[-spec.task_tokens :]

    def silence(self) -> Tokens:
        return self._tokens(" ...")

    def _memories(self, spec: SocietySpec, draw: np.random.Generator) -> Iterator[str]:
        names = [each.name for each in spec.agents]
        while True:
            text = str(draw.choice(_MEMORIES))
            yield "- " + text.format(who=draw.choice(names), place=spec.scenario.place, when=draw.choice(_TIMES)) + "\n"

    def _stream(self, spec: SocietySpec, agent: int, what: str) -> np.random.Generator:
        digest = hashlib.blake2b(f"{self._seed} {spec.id} {agent} {what}".encode(), digest_size=8).digest()
        return np.random.default_rng(list(digest))

    def _cut(self, head: str, more: Iterator[str], count: int) -> Tokens:
        """`head` and as much of `more` as it takes, to `count` tokens."""
        text = head
        while len(made := self._tokens(text)) < count:
            text += "".join(next(more) for _ in range(1 + (count - len(made)) // _TOKENS_OF_A_LINE))
        return made[:count]

    def _tokens(self, text: str) -> Tokens:
        return np.array(self._encode(text), dtype=np.int32)


_NOTHING = np.empty(0, dtype=np.int32)
_TEMPLATE_TOKENS = 8
"""Fewer than a block: nothing to share."""
_TOKENS_OF_A_LINE = 16
_TRADES = (
    "a baker who rises at four", "a retired pilot", "a nurse on night shifts", "a student of maps", "a carpenter",
    "the keeper of the library", "a gardener", "a teacher of mathematics", "a violinist", "a mechanic", "a cook",
    "a translator", "the owner of a bicycle shop", "a bus driver", "a painter of signs", "a beekeeper",
)  # fmt: skip
_HABITS = (
    "never forgets a name", "doubts what is said twice", "likes lists", "speaks little and listens well",
    "makes up their mind quickly", "worries about the weather", "wants everybody to agree", "loves a good quarrel",
    "pays attention to money", "always comes early", "asks one question too many", "laughs at their own jokes",
)  # fmt: skip
_TIMES = ("Yesterday", "Last week", "On Sunday", "A year ago", "This morning", "In spring", "The other day", "At noon")
_MEMORIES = (
    "{when} {who} lent me a ladder and never asked for it back.", "{when} I met {who} near {place}.",
    "{when} {who} told me about an argument over a fence.", "{when} I promised {who} to write a letter.",
    "{when} there was a queue at {place}, and {who} was at its end.", "{when} I heard {who} sing.",
    "{when} {who} and I agreed on what to do if it rains.", "{when} I lost a glove, and {who} found it.",
    "{when} {who} asked me to keep a secret, which I did.", "{when} we talked about {place} until late.",
    "{when} {who} was wrong about the price of coal.", "{when} I repaired a chair for {who}.",
    "{when} nobody came but {who}, who stayed for tea.", "{when} {who} said that the clock is five minutes slow.",
)  # fmt: skip
_ASIDES = (
    "It is a mild day.", "Somebody should write this down.", "There is not much time.", "We have done it before.",
    "The others may see it differently.", "That is all I know.", "It can wait until tomorrow.", "Let us be quick.",
    "I would rather hear it from somebody else.", "The door is open.", "It was louder last year.", "I am in no hurry.",
)  # fmt: skip
