"""What a society is about: a name in, place, occasion and the sizes of its texts out.

Two kinds. *Generative agents* are few, and remember some hundred tokens each; an *agent society* is many, with long
private memories. The first three of the first kind are named after the papers' own; all words are ours.

Source: TokenDance (arXiv 2604.03143), whose workloads have these two kinds; it publishes neither texts nor lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from kvarn.simulation.workloads import WorkloadError


class Society(StrEnum):
    """The kind of a scenario."""

    generative = "generative"
    agentsociety = "agentsociety"


class Span(NamedTuple):
    """Token counts, evenly from `low` to `high`, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, field: str) -> Span:
        """ "256" or "128:512". WorkloadError that names the field."""
        low, colon, high = text.partition(":")
        try:
            span = cls(int(low), int(high if colon else low))
        except ValueError:
            raise WorkloadError(f"{field} is {text!r}; expected tokens like 256, or 128:512") from None
        return span.checked(field)

    def checked(self, field: str) -> Span:
        """Itself. WorkloadError where it holds no count of at least 1."""
        if not 1 <= self.low <= self.high:
            raise WorkloadError(f"{field} is {self.low}:{self.high}; expected 1 <= low <= high")
        return self


@dataclass(frozen=True)
class Scenario:
    """Where agents meet, why, and what there is to say."""

    name: str
    society: Society
    agents: int
    """How many, where a workload does not say."""
    place: str
    occasion: str
    news: tuple[str, ...]
    """What they may open with."""
    questions: tuple[str, ...]
    """What is asked of them, a question a round, over and over."""


HISTORY = {Society.generative: Span(128, 512), Society.agentsociety: Span(1024, 4096)}
"""Tokens of private history, where a workload does not say."""
OUTPUT = {Society.generative: Span(32, 128), Society.agentsociety: Span(32, 128)}
"""Tokens of an answer, likewise."""

_SMALL, _LARGE = Society.generative, Society.agentsociety
SCENARIOS = (
    Scenario(
        "meet-and-greet", _SMALL, 4, "the kitchen of a shared house", "four people move in on the same day",
        ("I carried the last box up myself.", "I brought bread and a kettle.", "My room looks out on the yard."),
        ("Say who you are and ask somebody one thing.", "Answer what you were asked.", "Suggest a rule for the house."),
    ),
    Scenario(
        "valentines-party", _SMALL, 8, "the back room of a cafe", "a party on the fourteenth of February is planned",
        ("We have chairs for twenty.", "Nobody has been asked to bring music yet.", "I know who wants to be invited."),
        ("Offer to do something for the party.", "Invite somebody and say why.", "Say what is still missing."),
    ),
    Scenario(
        "information-outbreak", _SMALL, 10, "a small town", "somebody will stand for mayor, and word gets around",
        ("I heard it from my neighbour.", "It was said at the baker's.", "I do not believe it yet."),
        ("Say what you have heard, and from whom.", "Say what you make of it.", "Pass on what is new."),
    ),
    Scenario(
        "power-cut", _SMALL, 6, "a house of six flats", "the lights are out since seven in the evening",
        ("The lift stands between two floors.", "I have candles.", "My phone is nearly empty."),
        ("Say what you need most.", "Say what you can lend.", "Decide what to do first and why."),
    ),
    Scenario(
        "harvest-market", _SMALL, 12, "a market hall", "growers agree on prices before the doors open",
        ("My apples came in early.", "There are few pears this year.", "I sold out last week by ten."),
        ("Name your price and your reason.", "Answer the price that surprised you.", "Say what you will do now."),
    ),
    Scenario(
        "lost-dog", _SMALL, 5, "a park by the river", "a brown dog ran off an hour ago",
        ("I saw something brown by the bridge.", "He answers to a whistle.", "The gate was open."),
        ("Say where you have looked.", "Say where to look next and who goes.", "Put together what is known."),
    ),
    Scenario(
        "school-play", _SMALL, 16, "a gymnasium", "the play is in two weeks and the wolf is ill",
        ("I know the wolf's lines.", "The forest is painted.", "We have no ladder."),
        ("Say what you are ready for.", "Propose who does what.", "Point out what may go wrong."),
    ),
    Scenario(
        "bridge-vote", _SMALL, 9, "a village hall", "a vote on the footbridge is due tonight",
        ("I cross it every morning.", "It costs more than the roof.", "The planks are soft."),
        ("Say how you would vote.", "Answer the strongest point against you.", "Say what would change your mind."),
    ),
    Scenario(
        "storm-warning", _LARGE, 16, "a harbour town", "a storm is expected within a day",
        ("The boats are being brought in.", "The school is closed tomorrow.", "I have never seen the sea so flat."),
        ("Say what you do today.", "Say whom you will look after.", "Report what has changed."),
    ),
    Scenario(
        "bus-strike", _LARGE, 32, "a city district", "no buses run this week",
        ("I walked for an hour.", "There is a place free in my car.", "My shift begins at five."),
        ("Say how you get to work.", "Offer or ask for a lift.", "Say what you think of the strike."),
    ),
    Scenario(
        "rent-rise", _LARGE, 64, "a block of rented flats", "rents go up by a tenth in spring",
        ("The letter came on Monday.", "I have lived here for thirty years.", "We should write back together."),
        ("Say what it means to you.", "Propose what the tenants do.", "Say whose proposal you follow and why."),
    ),
)  # fmt: skip


def find_scenario(name: str) -> Scenario:
    """WorkloadError that lists the names there are."""
    for scenario in SCENARIOS:
        if scenario.name == name:
            return scenario
    raise WorkloadError(f"scenario is {name!r}; expected one of {', '.join(each.name for each in SCENARIOS)}")


def scenarios_of(society: Society) -> tuple[Scenario, ...]:
    """All of a kind."""
    return tuple(scenario for scenario in SCENARIOS if scenario.society is society)
