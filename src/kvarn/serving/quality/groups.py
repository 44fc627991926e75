"""Groups of agents to measure on: each reads the same remarks in an order of its own, behind a history of its own.

An agent has two prompts of the same parts but for the last: a task that it may answer as it likes, and a question for a
word that one of the remarks has. Seeded: the same seed, the same texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvarn.serving.quality import passages
from kvarn.serving.rounds.hints import Segment, SegmentKind

Encode = Callable[[str], list[int]]
Part = tuple[SegmentKind, list[int]]
_MARK = "\u0001"


@dataclass(frozen=True, slots=True)
class Prompt:
    tokens: list[int]
    segments: tuple[Segment, ...]
    answer: str = ""
    """What has to occur in what is said to it; empty: there is no such thing."""


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts of the agents of one round."""

    tasks: tuple[Prompt, ...]
    questions: tuple[Prompt, ...] = ()


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around an agent's history and its task, such as a chat template's marks."""

    begin: str = ""
    between: str = "\n"
    end: str = "\n"

    @classmethod
    def of(cls, render: Callable[[list[dict[str, str]]], str]) -> Frame:
        """Of a chat template: the history is the system's message, all else the user's."""
        messages = [{"role": "system", "content": _MARK}, {"role": "user", "content": _MARK}]
        begin, between, end = render(messages).split(_MARK)
        return cls(begin, between, end)


def prompt_of(parts: Sequence[Part], answer: str = "") -> Prompt:
    """A prompt of parts, each with its kind."""
    segments = tuple(Segment(kind, len(tokens)) for kind, tokens in parts)
    return Prompt([token for _, tokens in parts for token in tokens], segments, answer)


def make_groups(encode: Encode, frame: Frame, count: int, *, seed: int = 0) -> Iterator[Group]:
    """`count` groups of 4 to 6 agents; `encode` makes token ids of a text, with marks but no BOS."""
    for number in range(count):
        draw = np.random.default_rng([seed, number])
        yield _group(encode, frame, draw, agents=4 + number % 3)


def make_judges(encode: Encode, frame: Frame, count: int, *, seed: int = 0) -> Iterator[Group]:
    """Groups of judges: each reads the same remarks in another order and is about to name whose is the best."""
    for number in range(count):
        draw = np.random.default_rng([seed, number, 1])
        names = draw.permutation(passages.NAMES)[:4].tolist()
        texts = draw.permutation(np.array(passages.PASSAGES, dtype=object))[:4].tolist()
        remarks = [encode(f"\n\n{name} said: {text}") for name, text in zip(names, texts, strict=True)]
        end = encode(f"\n\nWhose remark is the best? Answer with a name.{frame.end}The best remark is that of")
        judges = []
        for i in range(4):
            history: Part = ("private", encode(_history(frame, names[i], draw)))
            shared: list[Part] = [("shared", remarks[j]) for j in np.roll(np.arange(4), -i).tolist()]
            judges.append(prompt_of([history, *shared, ("task", end)]))
        yield Group(tuple(judges))


def _group(encode: Encode, frame: Frame, draw: np.random.Generator, agents: int) -> Group:
    names = draw.permutation(passages.NAMES)[:agents].tolist()
    facts = draw.permutation(len(passages.FACTS))[:agents].tolist()
    secrets = draw.permutation(passages.SECRETS)[:agents].tolist()
    texts = draw.permutation(np.array(passages.PASSAGES, dtype=object))[:agents].tolist()
    remarks = []
    for name, fact, secret, text in zip(names, facts, secrets, texts, strict=True):
        sentences = text.split(". ")
        sentences.insert(int(draw.integers(1, len(sentences))), f"{passages.FACTS[fact][1]} {secret}")
        remarks.append(encode(f"\n\n{name} said: " + ". ".join(sentences)))
    tasks, questions = [], []
    for i, name in enumerate(names):
        order = draw.permutation(agents) if i % 2 else np.roll(np.arange(agents), -i)
        shared: list[Part] = [("shared", remarks[j]) for j in order.tolist()]
        history: Part = ("private", encode(_history(frame, name, draw)))
        asked = int(draw.integers(agents))
        task = passages.TASKS[int(draw.integers(len(passages.TASKS)))]
        tasks.append(prompt_of([history, *shared, ("task", encode(f"\n\n{name}: {task}{frame.end}"))]))
        question, beginning = passages.FACTS[facts[asked]]
        wanted = encode(f"\n\n{name}: {question}{frame.end}{beginning}")
        questions.append(prompt_of([history, *shared, ("task", wanted)], secrets[asked]))
    return Group(tuple(tasks), tuple(questions))


def _history(frame: Frame, name: str, draw: np.random.Generator) -> str:
    """Who somebody is and what he remembers: of any length, so that remarks stand anywhere."""
    trade = draw.choice(passages.TRADES)
    memories = draw.permutation(passages.MEMORIES)[: int(draw.integers(4, len(passages.MEMORIES)))]
    return (
        f"{frame.begin}You are one of several people who talk at a table. You are {name}, {trade}. You remember:\n"
        + "\n".join(f"- {each}" for each in memories)
        + f"{frame.between}The others said:"
    )
