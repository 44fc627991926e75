"""Programs: runs of applications whose model calls come one by one; what is known of each, for order and for show.

A request belongs to the program that its hints name; without hints, to that of the request which it goes on from, or
it begins one of its own. Times in seconds on the engine's clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from kvarn.serving.agents.hints import UNKNOWN, AgentHints

_MOST_PROGRAMS = 2048
_MOST_NODES = 256
"""Of a program, remembered for show."""
_PROMPT_WEIGHT = 0.1
"""What computing a prompt token costs, in tokens of output."""


class Comer(Protocol):
    """A request that comes and goes."""

    @property
    def id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def agent(self) -> AgentHints | None: ...
    @property
    def continues(self) -> str: ...
    @property
    def arrival(self) -> float: ...


@dataclass(slots=True)
class Node:
    """One model call of a program, for people who watch."""

    request: str
    hints: AgentHints
    since: float
    ended: bool = False


@dataclass(slots=True, eq=False)
class Program:
    """One run of an application."""

    id: str
    tenant: str
    began: float
    last_seen: float
    service: float = 0.0
    """Tokens of output, or as much work, that it has had."""
    remaining_seconds: float = UNKNOWN
    """To its end along the longest way, when its latest request came; UNKNOWN without a graph."""
    total_seconds: float = UNKNOWN
    live: set[str] = field(default_factory=set)
    """Its requests that have not ended."""
    nodes: OrderedDict[str, Node] = field(default_factory=OrderedDict)
    """By name, or by request id where it has none."""


class Programs:
    """All of them, the longest unseen forgotten first."""

    def __init__(self) -> None:
        self._programs: OrderedDict[tuple[str, str], Program] = OrderedDict()
        self._of_request: OrderedDict[str, Program] = OrderedDict()
        self._began: OrderedDict[str, float] = OrderedDict()
        """Requests, and when the conversations did that they go on with."""
        self._live: set[str] = set()
        """Requests of programs that have not ended."""

    def __iter__(self) -> Iterator[Program]:
        return iter(self._programs.values())

    def __len__(self) -> int:
        return len(self._programs)

    @property
    def num_live(self) -> int:
        """Requests of programs that have not ended."""
        return len(self._live)

    def of(self, request_id: str) -> Program | None:
        """The program of a request, ended ones included as long as they are remembered."""
        return self._of_request.get(request_id)

    def began(self, request_id: str) -> float:
        """When the conversation of a request began; -inf for an unknown one."""
        return self._began.get(request_id, float("-inf"))

    def note_added(self, request: Comer, now: float, continues: str = "") -> None:
        """A request has come, going on from another; one without hints that goes on from none belongs to no program."""
        hints, continues = request.agent, continues or request.continues
        self._began[request.id] = self._began.get(continues, request.arrival)
        while len(self._began) > 16 * _MOST_PROGRAMS:
            self._began.popitem(last=False)
        program = self._of_request.get(continues)
        if program is not None and program.tenant != request.tenant:
            program = None
        if hints is not None and hints.program:
            program = self._named(request.tenant, hints.program, now)
        elif program is None and hints is None:
            return
        elif program is None:
            program = self._named(request.tenant, request.id, now)
        program.live.add(request.id)
        self._live.add(request.id)
        program.last_seen = now
        self._of_request[request.id] = program
        while len(self._of_request) > 16 * _MOST_PROGRAMS:
            self._of_request.popitem(last=False)
        if hints is None:
            return
        if hints.remaining_seconds >= 0:
            left = program.remaining_seconds
            program.remaining_seconds = hints.remaining_seconds if left < 0 else min(left, hints.remaining_seconds)
        if hints.total_seconds >= 0:
            program.total_seconds = hints.total_seconds
        program.nodes[hints.node or request.id] = Node(request.id, hints, now)
        while len(program.nodes) > _MOST_NODES:
            program.nodes.popitem(last=False)

    def adopt(self, request: Comer, now: float) -> Program:
        """A request that belonged to no program turns out to be an agent's."""
        program = self._of_request.get(request.id)
        if program is None:
            program = self._of_request[request.id] = self._named(request.tenant, request.id, now)
        return program

    def note_ended(self, request: Comer, now: float) -> None:
        self._live.discard(request.id)
        program = self._of_request.get(request.id)
        if program is None:
            return
        program.live.discard(request.id)
        program.last_seen = now
        for node in program.nodes.values():
            if node.request == request.id:
                node.ended = True

    def note_service(self, request_id: str, prompt_tokens: int, output_tokens: int) -> None:
        """A request of a program has had so many tokens computed."""
        program = self._of_request.get(request_id)
        if program is not None:
            program.service += output_tokens + _PROMPT_WEIGHT * prompt_tokens

    def close(self, tenant: str, id: str) -> bool:
        """Forget a program that nothing more comes of; whether it was known."""
        return self._programs.pop((tenant, id), None) is not None

    def _named(self, tenant: str, id: str, now: float) -> Program:
        key = (tenant, id)
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = Program(id, tenant, now, now)
            if len(self._programs) > _MOST_PROGRAMS:
                self._drop_one()
        self._programs.move_to_end(key)
        return program

    def _drop_one(self) -> None:
        """The longest unseen of those that have nothing running, else of all."""
        idle = next((key for key, program in self._programs.items() if not program.live), None)
        self._programs.pop(idle or next(iter(self._programs)))
