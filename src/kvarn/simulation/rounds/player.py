"""Plays societies on an engine in this process: `SocietySpec`s in, a `RoundsRun` out.

The requests of a round are sent when the last answer of the round before is there, each after its agent's thinking.
A society in which a request fails has failed, and what it still has in the engine is cancelled; the others go on.

`play_rounds` simulates, on a virtual clock. What a simulated device says depends on places alone, so agents would say
the same, which real ones do not. Agents therefore read seeded texts as long as what was said; one that remembers its
own words remembers the device's, whose KV is there. With `run_rounds` a real engine says what agents read.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvarn.errors import RequestError
from kvarn.serving.engine import Emission, Engine
from kvarn.serving.request import FinishReason, Request
from kvarn.serving.sampling.params import SamplingParams
from kvarn.simulation.rounds.progress import Ask, SocietyRun
from kvarn.simulation.rounds.report import RoundRecord, RoundsRun, TurnRecord, end_round
from kvarn.simulation.rounds.texts import RoundTexts, SeededTexts, Tokens
from kvarn.simulation.rounds.workload import SocietySpec
from kvarn.simulation.runner import play

OnRound = Callable[[RoundRecord], None]


def play_rounds(
    engine: Engine,
    specs: Sequence[SocietySpec],
    *,
    segments: bool = True,
    seed: int = 0,
    on_round: OnRound = lambda record: None,
) -> RoundsRun:
    """Play all societies to their ends; `on_round` hears of each round. `engine.clock` must be a `VirtualClock`.

    With `segments` the engine is told of prompts' parts and of rounds, else it gets the same prompts and nothing more.
    Raises RuntimeError when the engine lets requests wait for ever.
    """
    texts = SeededTexts(0, engine.vocab_size, seed)
    players = _Players(engine, specs, _Manner(texts, segments, texts), on_round)
    play(engine, players, players.note)
    return players.run


def run_rounds(
    engine: Engine,
    specs: Sequence[SocietySpec],
    texts: RoundTexts,
    *,
    segments: bool = True,
    eos_tokens: frozenset[int] = frozenset(),
    on_round: OnRound = lambda record: None,
) -> RoundsRun:
    """The same on an engine of real time, greedily, from its present on. Records have what agents said.

    Answers have the lengths of the specs, or end before at one of `eos_tokens`, which nobody gets to read.
    """
    clock, players = engine.clock, _Players(engine, specs, _Manner(texts, segments, None, eos_tokens), on_round)
    while engine.has_work or players.next_event() != float("inf"):
        players.act(clock.now())
        if engine.has_work:
            emissions = engine.step()
            players.read(emissions, clock.now())
            players.note(engine, clock.now())
            time.sleep(min(engine.rest_seconds(), max(0.0, players.next_event() - clock.now())))
        else:
            time.sleep(max(0.0, players.next_event() - clock.now()))
    return players.run


@dataclass(frozen=True)
class _Manner:
    """How requests are made and answers passed on."""

    texts: RoundTexts
    segments: bool
    invented: SeededTexts | None = None
    """What agents read in place of what was said."""
    eos_tokens: frozenset[int] = frozenset()


class _Players:
    """All agents of all societies: `Clients` of kvarn.simulation.runner."""

    def __init__(
        self,
        engine: Engine,
        specs: Sequence[SocietySpec],
        manner: _Manner,
        on_round: OnRound,
    ) -> None:
        self.engine = engine
        self.run = RoundsRun(peak_blocks=0)
        self._manner = manner
        self._on_round = on_round
        start = engine.clock.now()
        self._arrivals = sorted(((start + spec.arrival, index) for index, spec in enumerate(specs)), reverse=True)
        self._societies = [SocietyRun(spec, manner.texts) for spec in specs]
        self._thinking: list[tuple[float, int, float, SocietyRun, Ask]] = []
        """(when it is sent, a number that tells equals apart, when the round was ready, ...)"""
        self._count = 0
        self._asked: dict[str, tuple[SocietyRun, Ask, Request, TurnRecord]] = {}
        """Of requests that the engine has."""
        self._turns: dict[str, list[TurnRecord]] = {}
        """Society -> turns of the round under way."""

    def act(self, now: float) -> None:
        # Things were due at moments within the step that has just ended: that is when they have happened.
        while self._arrivals and self._arrivals[-1][0] <= now:
            due, index = self._arrivals.pop()
            self._begin(self._societies[index], self._societies[index].start(), due)
        while self._thinking and self._thinking[0][0] <= now:
            due, _, ready, society, ask = heapq.heappop(self._thinking)
            if ask.society not in self.run.failures:
                self._send(society, ask, ready, due)

    def next_event(self) -> float:
        arrival = self._arrivals[-1][0] if self._arrivals else float("inf")
        return min(arrival, self._thinking[0][0]) if self._thinking else arrival

    def read(self, emissions: Sequence[Emission], now: float) -> None:
        for emission in emissions:
            if emission.request.id not in self._asked:  # cancelled, since its society has failed
                continue
            society, ask, request, turn = self._asked[emission.request.id]
            if emission.token is not None and not turn.first_token:
                turn.first_token = now
                # Of a request that has ended, what it shared is let go of.
                turn.cached_tokens, turn.reused_tokens = request.cached_tokens, request.reused_tokens
            if emission.finish_reason is None:
                continue
            del self._asked[request.id]
            turn.end = now
            turn.output_tokens, turn.preemptions = request.num_outputs, request.preemptions
            if emission.finish_reason not in (FinishReason.LENGTH, FinishReason.STOP):
                self._fail(ask.society, emission.error or str(emission.finish_reason))
                continue
            said, told = self._words(request, emission.finish_reason), None
            if self._manner.invented is not None:
                told = self._manner.invented.named(f"{ask.society} {ask.round} {ask.agent} says", len(said))
            else:
                turn.said = said.tolist()
            following = society.answered(ask.agent, said, told)
            if following or society.done:
                self._end_round(ask.society)
            self._begin(society, following, now)

    def note(self, engine: Engine, now: float) -> None:
        """After each step that computed."""
        self.run.peak_blocks = max(self.run.peak_blocks or 0, engine.cache.pool.num_active)

    def _words(self, request: Request, reason: FinishReason) -> Tokens:
        end = request.num_tokens - (reason is FinishReason.STOP)
        return request.tokens[request.prompt_length : end].copy()

    def _begin(self, society: SocietyRun, asks: Sequence[Ask], ready: float) -> None:
        for ask in asks:
            if ask.think_seconds:
                self._count += 1
                heapq.heappush(self._thinking, (ready + ask.think_seconds, self._count, ready, society, ask))
            elif ask.society not in self.run.failures:
                self._send(society, ask, ready, ready)

    def _send(self, society: SocietyRun, ask: Ask, ready: float, now: float) -> None:
        prompt, manner = ask.prompt, self._manner
        turn = TurnRecord(ask.society, ask.round, ask.hint.agent, ready, now, prompt_tokens=len(prompt))
        self.run.turns.append(turn)
        self._turns.setdefault(ask.society, []).append(turn)
        request = Request.create(
            f"{ask.hint.id}/{ask.agent}",
            prompt,
            SamplingParams(temperature=0.0, max_tokens=ask.output_tokens, ignore_eos=not manner.eos_tokens),
            arrival=now,
            eos_tokens=manner.eos_tokens,
            segments=ask.segments if manner.segments else (),
            round=ask.hint if manner.segments else None,
        )
        try:
            self.engine.add(request)
        except RequestError as error:
            self._fail(ask.society, f"refused: {error.code or error}")
            return
        self._asked[request.id] = (society, ask, request, turn)

    def _end_round(self, society: str) -> None:
        record = end_round(self._turns.pop(society))
        self.run.rounds.append(record)
        self._on_round(record)

    def _fail(self, society: str, reason: str) -> None:
        self.run.failures.setdefault(society, reason)
        for id in [id for id, (_, ask, _, _) in self._asked.items() if ask.society == society]:
            del self._asked[id]
            self.engine.cancel(id)
