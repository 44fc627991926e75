"""Plays programs of agents against any OpenAI-compatible server, with tools that really sleep: an `AgentRun` out.

The client of each program is a `ProgramRun`: it sends a model call when all that it is after has ended. Every answer is
streamed and of exact length; the token ids that come back (`return_token_ids`) are the conversation that goes on. A
server that gives none is sent text, whose lengths are then about what they should be and not exact.

A server with kvarn's /v1/agents/events hears of tool calls and gets hints; any other gets plain requests. Events are
sent beside the work: a tool does not wait until its start is known, nor an agent until its end is.

What goes wrong in one program ends that program, with the node and the reason, and no other.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from kvarn.bench import http
from kvarn.bench.client import failure_reason
from kvarn.bench.completions import Completion, CompletionFailed, complete
from kvarn.bench.prompts import DEFAULT_TOKENS
from kvarn.errors import KvarnError
from kvarn.serving.agents.hints import UNKNOWN, AgentHints
from kvarn.simulation.agents.programs import ProgramSpec
from kvarn.simulation.agents.progress import Action, Ask, Events, ProgramRun, Run, Texts, Tokens, Words
from kvarn.simulation.agents.report import AgentRun, CallRecord, ProgramRecord, ToolRecord

_PROBE = (
    "It was one of those days on which nothing much was going to happen, and everybody who had been told so had gone "
    "out to look at the sea again while the others stayed at home with their books and waited for the rain to come in "
    "from the hills as it had done on every other day of that year"
)
_WORDS = tuple(f" {word}" for word in dict.fromkeys(_PROBE.lower().replace(",", "").split()))
"""Common words, one token each in most vocabularies."""
_PROBE_TOKENS = 4


@dataclass(frozen=True)
class AgentSettings:
    """How to play. Durations in seconds."""

    endpoint: http.Endpoint
    model: str
    events: Events = Events.explicit
    """Only for a server that has the endpoint."""
    hints: bool = True
    """Likewise."""
    ignore_eos: bool = True
    timeout: float = 600.0
    """For one model call."""


@dataclass(frozen=True)
class Abilities:
    """What a server turned out to know."""

    token_ids: bool
    """It says which tokens it made."""
    events: bool
    """It has /v1/agents/events."""


class _TextWords:
    """Texts of common words, as Unicode code points: about one word a token."""

    def tokens(self, name: str, count: int) -> Tokens:
        chosen = Texts(0, len(_WORDS)).tokens(name, count)
        return np.array([ord(letter) for word in chosen for letter in _WORDS[word]], dtype=np.int32)


async def probe(settings: AgentSettings) -> Abilities:
    """Ask the server for a few tokens, and whether it takes events. KvarnError when it does not answer."""
    try:
        answer = await _complete(settings, np.array([DEFAULT_TOKENS[0]] * 8, dtype=np.int32), _PROBE_TOKENS, ids=True)
        token_ids = len(answer.token_ids) == _PROBE_TOKENS
    except CompletionFailed as refused:  # it may be the field or the ids in the prompt that it does not like
        token_ids = False
        try:
            await _complete(settings, np.array([ord(letter) for letter in _PROBE]), _PROBE_TOKENS, ids=False)
        except CompletionFailed:
            raise KvarnError(f"the server does not answer: {refused}") from refused
    try:
        async with asyncio.timeout(settings.timeout):
            reply = await http.post(settings.endpoint, "/agents/events", b"{}")
        reply.close()
        events = reply.status == 400  # it has the endpoint, and says that this is no event
    except (http.TransferFailed, OSError, EOFError, TimeoutError):
        events = False
    return Abilities(token_ids, events)


async def play_programs(
    settings: AgentSettings,
    specs: Sequence[ProgramSpec],
    abilities: Abilities,
    *,
    on_done: Callable[[ProgramRecord], None] = lambda record: None,
) -> AgentRun:
    """Play every program from its arrival on; `on_done` hears of each that ends. Times are since the start."""
    run = AgentRun([], [], [])
    start = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for spec in specs:
            group.create_task(_Program(settings, abilities, spec, run, start).play(on_done))
    return run


class _Program:
    """The client of one program."""

    def __init__(
        self, settings: AgentSettings, abilities: Abilities, spec: ProgramSpec, result: AgentRun, start: float
    ) -> None:
        self._settings = settings
        self._token_ids = abilities.token_ids
        self._hints = settings.hints and abilities.events
        self._events = settings.events if abilities.events else Events.none
        self._result = result
        self._start = start
        words: Words = Texts(*DEFAULT_TOKENS) if abilities.token_ids else _TextWords()
        self._run = ProgramRun(spec, words)
        self._ids: dict[str, str] = {}
        """Node -> the server's name of its answer."""
        self._turns: dict[str, str] = {}

    async def play(self, on_done: Callable[[ProgramRecord], None]) -> None:
        spec, error = self._run.spec, None
        await asyncio.sleep(max(0.0, self._start + spec.arrival - time.perf_counter()))
        try:
            async with asyncio.TaskGroup() as group:
                self._begin(group, self._run.start())
        except* CompletionFailed as failures:
            error = str(failures.exceptions[0])
        record = ProgramRecord(spec.id, spec.app, spec.arrival, self._now(), self._run.digest(), error)
        if self._hints and self._events is not Events.none:
            await self._tell({"type": "close", "program": spec.id})
        self._result.programs.append(record)
        on_done(record)

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _begin(self, group: asyncio.TaskGroup, actions: Sequence[Action]) -> None:
        for action in actions:
            group.create_task(self._ask(group, action) if isinstance(action, Ask) else self._call(group, action))

    async def _ask(self, group: asyncio.TaskGroup, ask: Ask) -> None:
        ready = self._now()
        turn = self._turns[ask.node] = self._turns[ask.continues] if ask.answers else ask.node
        record = CallRecord(self._run.spec.id, ask.node, ask.agent, turn, ready, prompt_tokens=len(ask.prompt))
        self._result.calls.append(record)
        hints = ask.hints if self._hints else None
        try:
            answer = await _complete(self._settings, ask.prompt, ask.output_tokens, ids=self._token_ids, hints=hints)
        except CompletionFailed as failure:
            raise CompletionFailed(f"{ask.node}: {failure}") from failure
        record.end = self._now()
        record.first_token = record.end if answer.first_token is None else answer.first_token - self._start
        record.prompt_tokens, record.output_tokens = answer.prompt_tokens or len(ask.prompt), answer.output_tokens
        record.cached_tokens = answer.cached_tokens
        self._ids[ask.node] = answer.id
        self._begin(group, self._run.answered(ask.node, answer.token_ids or [ord(letter) for letter in answer.text]))

    async def _call(self, group: asyncio.TaskGroup, tool: Run) -> None:
        start = self._now()
        request = self._ids[tool.caller]
        told = group.create_task(self._tell(self._start_event(tool, request)))
        await asyncio.sleep(tool.seconds)
        end = self._now()
        self._result.tools.append(
            ToolRecord(self._run.spec.id, tool.node, tool.kind, tool.caller, start, end, tool.predicted_seconds)
        )
        if self._events is Events.explicit:
            finish = {"type": "call_finish", "request": request, "seconds": round(end - start, 6)}
            group.create_task(self._tell(finish, after=told))
        self._begin(group, self._run.returned(tool.node))

    def _start_event(self, tool: Run, request: str) -> dict[str, Any]:
        event: dict[str, Any] = {"type": "call_start", "request": request, "tool": tool.kind}
        if self._events is Events.explicit:
            event |= {"seconds": tool.predicted_seconds} if tool.predicted_seconds != UNKNOWN else {}
            event |= {"stages": list(tool.stages)} if tool.stages else {}
        return event

    async def _tell(self, event: dict[str, Any], after: asyncio.Task[None] | None = None) -> None:
        """Send an event, once the one before it is known. What the server would not have is counted."""
        if self._events is Events.none:
            return
        if after is not None:
            await after
        try:
            async with asyncio.timeout(self._settings.timeout):
                reply = await http.post(self._settings.endpoint, "/agents/events", json.dumps(event).encode())
            reply.close()
            reason = "" if reply.status == 200 else f"HTTP {reply.status}"
        except (http.TransferFailed, OSError, EOFError, TimeoutError) as failure:
            reason = failure_reason(failure)
        if reason:
            refused = self._result.refused
            refused[f"{event['type']}: {reason}"] = refused.get(f"{event['type']}: {reason}", 0) + 1


async def _complete(
    settings: AgentSettings, prompt: Tokens, tokens: int, *, ids: bool, hints: AgentHints | None = None
) -> Completion:
    """One completion, read to its end; with `ids` in tokens both ways, else in text. Raises CompletionFailed."""
    body: dict[str, Any] = {
        "model": settings.model,
        "prompt": prompt.tolist() if ids else "".join(map(chr, prompt)),
        "max_tokens": tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body |= {"ignore_eos": True} if settings.ignore_eos else {}
    body |= {"return_token_ids": True} if ids else {}
    headers: tuple[tuple[str, str], ...] = ()
    if hints is not None:
        body["kv_hints"] = {"protocol_version": 1, "agent": msgspec.to_builtins(hints)}
        headers = (("x-session-id", hints.program),)
    answer = await complete(settings.endpoint, body, settings.timeout, headers)
    if ids and settings.ignore_eos and len(answer.token_ids) not in (tokens, 0):
        raise CompletionFailed(f"{len(answer.token_ids)} token ids came for {tokens} tokens")
    return answer
