"""The round barrier: requests of a round wait for one another, but not for long.

A round is complete when all its members are there, or those that wait have waited long enough; whoever comes later is
worked on at once, alone. No clock in here: the caller says what time it is.

Source: TokenDance (arXiv 2604.03143), 4.2, which takes rounds as given; the deadline is ours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kvarn.errors import RequestError
from kvarn.serving.rounds.hints import RoundHint

Member = TypeVar("Member", bound=Hashable)
RoundKey = tuple[str, str]
"""Tenant and id: rounds of different tenants have nothing to do with one another."""
_REMEMBERED = 1024
"""Complete rounds that late members are looked up in."""


@dataclass(slots=True)
class Gathered(Generic[Member]):
    """Members to work on together, in the order of their agents' names: it does not matter who came first."""

    key: RoundKey
    members: list[Member]
    opened_at: float
    late: bool = False


@dataclass(slots=True)
class _Open(Generic[Member]):
    size: int
    opened_at: float
    members: dict[str, Member] = field(default_factory=dict)
    left: set[str] = field(default_factory=set)
    """Agents whose requests were cancelled: nobody waits for them."""


class Barrier(Generic[Member]):
    """`wait`: seconds from a round's first member to its end at the latest."""

    def __init__(self, wait: float) -> None:
        self.wait = wait
        self._open: dict[RoundKey, _Open[Member]] = {}
        self._complete: OrderedDict[RoundKey, set[str]] = OrderedDict()
        self._late: list[Gathered[Member]] = []

    @property
    def num_waiting(self) -> int:
        return sum(len(each.members) for each in self._open.values()) + sum(len(each.members) for each in self._late)

    def join(self, member: Member, tenant: str, hint: RoundHint, agent: str, now: float) -> None:
        """A member has come. RequestError, and nothing changed, when its agent has come before or sizes differ."""
        key = (tenant, hint.id)
        seen = self._complete.get(key)
        if seen is not None:
            if agent in seen:
                raise _again(hint, agent)
            seen.add(agent)
            self._late.append(Gathered(key, [member], now, late=True))
            return
        opened = self._open.get(key)
        if opened is not None and agent in opened.members:
            raise _again(hint, agent)
        if opened is not None and opened.size != hint.size:
            raise RequestError(
                f"round {hint.id!r} was opened with size {opened.size}, not {hint.size}: send the same size with all "
                "its requests",
                field="round.size",
            )
        if opened is None:
            opened = self._open[key] = _Open(hint.size, now)
        opened.members[agent] = member
        opened.left.discard(agent)

    def leave(self, member: Member) -> bool:
        """A member that waits is gone; whether it was here."""
        for opened in self._open.values():
            for agent, other in opened.members.items():
                if other is member:
                    del opened.members[agent]
                    opened.left.add(agent)
                    return True
        for late in self._late:
            if member in late.members:
                self._late.remove(late)
                return True
        return False

    def due(self, now: float) -> list[Gathered[Member]]:
        """Rounds that are complete or have waited long enough; they are not here any more."""
        ready, self._late = self._late, []
        for key, opened in list(self._open.items()):
            if len(opened.members) + len(opened.left) < opened.size and now < opened.opened_at + self.wait:
                continue
            del self._open[key]
            self._complete[key] = set(opened.members)
            if len(self._complete) > _REMEMBERED:
                self._complete.popitem(last=False)
            if opened.members:
                members = [opened.members[agent] for agent in sorted(opened.members)]
                ready.append(Gathered(key, members, opened.opened_at))
        return ready

    def wake_at(self) -> float:
        """When `due` will have something to tell though nobody comes."""
        return min((opened.opened_at + self.wait for opened in self._open.values()), default=float("inf"))


def _again(hint: RoundHint, agent: str) -> RequestError:
    return RequestError(
        f"agent {agent!r} has a request in round {hint.id!r} already: use one id for one round, and for each of its "
        "requests another round.agent",
        field="round.agent",
        status=409,
    )
