"""Plays societies of agents against any OpenAI-compatible server: `SocietySpec`s in, a `RoundsRun` out.

The requests of a round are sent when the last answer of the round before is there, each after its agent's thinking. A
server that takes `segments` and `round` is told of prompts' parts; any other gets the same token ids as a plain prompt.
What an agent has said goes on as the very tokens that came back (`return_token_ids`). A server that gives none needs a
tokenizer on this side, and what agents then read are the tokens of the text.

A request that fails ends its society, with the reason, and no other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from kvarn.bench import http
from kvarn.bench.completions import Completion, CompletionFailed, complete
from kvarn.bench.prompts import DEFAULT_TOKENS
from kvarn.errors import KvarnError
from kvarn.simulation.rounds.progress import Ask, SocietyRun
from kvarn.simulation.rounds.report import RoundRecord, RoundsRun, TurnRecord, end_round
from kvarn.simulation.rounds.texts import RoundTexts
from kvarn.simulation.rounds.workload import SocietySpec

Encode = Callable[[str], Sequence[int]]
_PROBE_TOKENS = 2


@dataclass(frozen=True)
class RoundSettings:
    """How to play."""

    endpoint: http.Endpoint
    model: str
    segments: bool = True
    """Tell the server of segments and rounds: only for one that takes them."""
    ignore_eos: bool = True
    """Ask for answers of exactly the wanted length."""
    timeout: float = 600.0
    """Seconds for one request."""


@dataclass(frozen=True)
class Abilities:
    """What a server turned out to know."""

    token_ids: bool
    """It says which tokens it made."""
    segments: bool
    """It takes the parts of a prompt."""


async def probe(settings: RoundSettings) -> Abilities:
    """Ask the server for a few tokens, of segments first if they are wanted. KvarnError when it does not answer."""
    words = [DEFAULT_TOKENS[0]] * 4
    parts = [{"kind": kind, "content": words} for kind in ("private", "shared", "task")]
    takes_segments = False
    if settings.segments:
        try:
            answer = await complete(settings.endpoint, _body(settings, _PROBE_TOKENS, segments=parts), settings.timeout)
            # A server that reads a field it does not know as no prompt at all has not taken the twelve tokens.
            takes_segments = answer.prompt_tokens >= 3 * len(words)
        except CompletionFailed:
            takes_segments = False
    try:
        answer = await complete(settings.endpoint, _body(settings, _PROBE_TOKENS, prompt=words), settings.timeout)
    except CompletionFailed as refused:
        raise KvarnError(f"the server does not answer: {refused}") from refused
    return Abilities(len(answer.token_ids) == _PROBE_TOKENS, takes_segments)


async def play_rounds(
    settings: RoundSettings,
    specs: Sequence[SocietySpec],
    texts: RoundTexts,
    *,
    encode: Encode | None = None,
    on_round: Callable[[RoundRecord], None] = lambda record: None,
) -> RoundsRun:
    """Play every society from its arrival on; `on_round` hears of each round. Times are since the start.

    `encode` makes tokens of answers where the server does not say them.
    """
    run, start = RoundsRun(), time.perf_counter()
    # The server must not take the rounds of two runs for one.
    name = uuid4().hex[:8]
    async with asyncio.TaskGroup() as group:
        for spec in specs:
            group.create_task(_Society(settings, spec, texts, encode, run, start, name).play(on_round))
    return run


class _Society:
    """The client of one society."""

    def __init__(
        self,
        settings: RoundSettings,
        spec: SocietySpec,
        texts: RoundTexts,
        encode: Encode | None,
        result: RoundsRun,
        start: float,
        name: str,
    ) -> None:
        self._settings = settings
        self._run = SocietyRun(spec, texts)
        self._encode = encode
        self._result = result
        self._start = start
        self._name = name

    async def play(self, on_round: Callable[[RoundRecord], None]) -> None:
        spec = self._run.spec
        await asyncio.sleep(max(0.0, self._start + spec.arrival - time.perf_counter()))
        asks, ready = self._run.start(), self._now()
        try:
            while asks:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._ask(ask, ready)) for ask in asks]
                turns, answers = zip(*(task.result() for task in tasks), strict=True)
                for ask, turn, answer in zip(asks, turns, answers, strict=True):
                    turn.said = list(self._said(answer))
                    following = self._run.answered(ask.agent, turn.said)
                record = end_round(turns)
                self._result.rounds.append(record)
                on_round(record)
                asks, ready = following, record.end
        except* CompletionFailed as failures:
            self._result.failures[spec.id] = str(failures.exceptions[0])

    def _now(self) -> float:
        return time.perf_counter() - self._start

    async def _ask(self, ask: Ask, ready: float) -> tuple[TurnRecord, Completion]:
        body = self._request(ask)
        await asyncio.sleep(max(0.0, ready + ask.think_seconds - self._now()) if ask.think_seconds else 0.0)
        turn = TurnRecord(ask.society, ask.round, ask.hint.agent, ready, self._now())
        self._result.turns.append(turn)
        answer = await complete(self._settings.endpoint, body, self._settings.timeout)
        turn.end = self._now()
        turn.first_token = turn.end if answer.first_token is None else answer.first_token - self._start
        turn.prompt_tokens, turn.output_tokens = answer.prompt_tokens, answer.output_tokens
        turn.cached_tokens, turn.reused_tokens = answer.cached_tokens, answer.reused_tokens
        return turn, answer

    def _said(self, answer: Completion) -> Sequence[int]:
        """Nobody reads the token that ends an answer, which comes among the others."""
        if answer.token_ids or not answer.text:
            return answer.token_ids[:-1] if answer.finish_reason == "stop" else answer.token_ids
        if self._encode is None:
            raise CompletionFailed("no token ids came")
        return self._encode(answer.text)

    def _request(self, ask: Ask) -> dict[str, Any]:
        if not self._settings.segments:
            return _body(self._settings, ask.output_tokens, prompt=ask.prompt.tolist())
        segments = [
            {"kind": part.kind, "content": part.tokens.tolist()} | ({"id": part.id} if part.id else {})
            for part in ask.parts
        ]
        hint = {"id": f"{self._name}/{ask.hint.id}", "size": ask.hint.size, "agent": ask.hint.agent}
        return _body(self._settings, ask.output_tokens, segments=segments, round=hint)


def _body(settings: RoundSettings, tokens: int, **prompt: Any) -> dict[str, Any]:
    body = {
        "model": settings.model,
        **prompt,
        "max_tokens": tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    return body | ({"ignore_eos": True} if settings.ignore_eos else {})
