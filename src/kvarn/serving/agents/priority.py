"""Who goes first when agents compete: orders of requests, from what is known of them and of their programs.

A program's end is what its user waits for, so requests are ranked by program before they are ranked within one. The
default, `response_ratio`, is the classical compromise between shortest-remaining-first and fairness: how long a program
takes in the end, as a multiple of what it still needs. Nobody starves, as waiting alone raises it. Within a program
the node whose way to the end is longest goes first, and nodes that are waited for together go as one.

Source: TokenCake (arXiv 2510.18586), Eq. 3 and 4 (`published`); Highest Response Ratio Next (P. Brinch Hansen, 1971);
Autellix (arXiv 2502.13965) for attained service.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, log2
from typing import NamedTuple

from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.agents.programs import Program

NO_HINTS = AgentHints()
_PRIORITY_SECONDS = 10.0
"""Waiting that one point of a client's priority is worth."""
_MOST_PRIORITY = 30
_IMPORTANCE = 0.1
"""Share by which a point of importance above its tenant's mean speeds a program's age up."""
_SHORTEST_SECONDS = 1.0
_MOST_RATIO = 100.0
"""From here on first come, first served: a program of long ago that says it is nearly over would always go first."""


class Claim(NamedTuple):
    """What one request says for itself. Times in seconds."""

    arrival: float
    began: float
    """When its conversation did: the arrival of its first request."""
    tokens: int
    """Known ones and those it may still have."""
    seconds: float
    """What it would take with the device to itself."""
    hints: AgentHints = NO_HINTS
    program: Program | None = None
    priority: int = 0
    """Lower goes first."""
    importance: float = 0.0
    """Above (or below) the mean of its tenant's."""


Key = tuple[float, ...]
"""Lower goes first."""
Order = Callable[[Claim, float], Key]


def first_come(claim: Claim, now: float) -> Key:
    """By the arrival of the conversation: what a server does whose requests stay while their tools run."""
    return (claim.priority, claim.began)


def first_request(claim: Claim, now: float) -> Key:
    """By the arrival of each request: what a server does that knows nothing of agents."""
    return (claim.priority, claim.arrival)


def first_program(claim: Claim, now: float) -> Key:
    """By the arrival of the program; within it, the longest way to the end first."""
    began = claim.began if claim.program is None else claim.program.began
    return (claim.priority, began, -claim.hints.remaining_seconds, claim.arrival)


def attained_service(claim: Claim, now: float) -> Key:
    """The program that has had least first, in powers of two, so that equals do not take turns."""
    service = 0.0 if claim.program is None else claim.program.service
    return (claim.priority, int(log2(1.0 + service / 256.0)), claim.arrival)


def published(claim: Claim, now: float, weight: float = 1.0) -> Key:
    """Eq. 3 and 4 to the letter: nothing for a last node, and less and less for who waits longer than its tokens."""
    wait = max(now - claim.arrival, 1e-3)
    static = weight * claim.hints.depth * claim.hints.fan_out
    dynamic = wait * log(max(claim.tokens, 1) / wait)
    return (claim.priority, -(static + dynamic))


def response_ratio(claim: Claim, now: float) -> Key:
    """What the program will have taken over what it still needs, the highest first."""
    program, hints = claim.program, claim.hints
    began = claim.began if program is None else program.began
    left = claim.seconds if program is None or program.remaining_seconds < 0 else program.remaining_seconds
    left = max(_SHORTEST_SECONDS, left)
    age = (now - began) * (1.0 + _IMPORTANCE * claim.importance)
    age -= _PRIORITY_SECONDS * max(-_MOST_PRIORITY, min(_MOST_PRIORITY, claim.priority))
    ratio = (age + left) / left
    if ratio >= _MOST_RATIO:
        return (-_MOST_RATIO, claim.arrival)
    return (-ratio, began, -hints.remaining_seconds, claim.arrival)


ORDERS: dict[str, Order] = {
    "response-ratio": response_ratio,
    "program": first_program,
    "service": attained_service,
    "conversation": first_come,
    "request": first_request,
    "published": published,
}
"""By name."""


def ranked(ids: Sequence[str], claims: Sequence[Claim], order: Order, now: float) -> dict[str, Key]:
    """The key of each request; those of a program that are waited for together have the best of theirs."""
    keys = {id: order(claim, now) for id, claim in zip(ids, claims, strict=True)}
    best: dict[tuple[Program, str], Key] = {}
    joins: list[tuple[str, tuple[Program, str]]] = []
    for id, claim in zip(ids, claims, strict=True):
        if claim.hints.join and claim.program is not None:
            group = (claim.program, claim.hints.join)
            joins.append((id, group))
            best[group] = min(best.get(group, keys[id]), keys[id])
    for id, group in joins:
        keys[id] = best[group]
    return keys
