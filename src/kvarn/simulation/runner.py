"""Runs a workload through an engine on a virtual clock: requests in, what happened to each out.

The loop plays the clients: it hands requests over at their arrival, takes those back whose clients left, and notes
when each token came. An engine sees what it would see under load, only faster. The same engine, workload and seed
give the same result on every machine.
"""

from __future__ import annotations

import gc
import heapq
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import RequestError
from kvarn.serving.clock import VirtualClock
from kvarn.serving.engine import Emission, Engine
from kvarn.serving.executors.simulated import token_at
from kvarn.serving.reader import DEFAULT_RATE
from kvarn.serving.request import FinishReason, Request
from kvarn.serving.sampling.params import SamplingParams
from kvarn.simulation.prompts import prompt_tokens
from kvarn.simulation.report import RequestRecord
from kvarn.simulation.workloads import RequestSpec

LEFT = "client left"
"""Error of the record of a client that did not wait for its whole answer."""
_IDLE_SECONDS = 5e-3
"""How far time goes on in a step in which the engine lets everybody wait."""
_TEND_SECONDS = 0.05
"""How often an engine without requests is asked what of its KV should move."""
_STUCK_SECONDS = 600.0
"""After so long without a token a wait is for ever: a bug of the policy."""


@dataclass
class LoadSeries:
    """The engine's load after every step that computed: parallel columns."""

    times: array[float] = field(default_factory=lambda: array("d"))
    """Seconds on the virtual clock."""
    running: array[int] = field(default_factory=lambda: array("q"))
    waiting: array[int] = field(default_factory=lambda: array("q"))
    active_blocks: array[int] = field(default_factory=lambda: array("q"))
    """KV blocks that requests hold."""

    def note(self, engine: Engine, now: float) -> None:
        self.times.append(now)
        self.running.append(len(engine.running))
        self.waiting.append(len(engine.waiting))
        self.active_blocks.append(engine.cache.pool.num_active)

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """Name -> values, shape (steps,) each."""
        names = ("times", "running", "waiting", "active_blocks")
        return {name: np.array(getattr(self, name), dtype=np.float64) for name in names}


@dataclass(frozen=True)
class Run:
    """What happened."""

    records: list[RequestRecord]
    """In the order of the workload."""
    load: LoadSeries


class Clients(Protocol):
    """Those who send requests to an engine and read what comes."""

    def act(self, now: float) -> None:
        """Do what is due."""
        ...

    def next_event(self) -> float:
        """When `act` will have something to do, whatever the engine does; infinity when never again."""
        ...

    def read(self, emissions: Sequence[Emission], now: float) -> None:
        """Take what a step has made."""
        ...


class _Readers:
    """Those who send the requests of a workload, each by itself."""

    def __init__(self, engine: Engine, specs: Sequence[RequestSpec], on_done: Callable[[RequestRecord], None]) -> None:
        self.engine = engine
        self.specs = specs
        self.on_done = on_done
        self.records: list[RequestRecord | None] = [None] * len(specs)
        self._order = sorted(range(len(specs)), key=lambda index: specs[index].arrival)
        self._next = 0
        self._times: dict[str, list[float]] = {}
        """Token times of every request that the engine has."""
        self._departures: list[tuple[float, str]] = []

    def act(self, now: float) -> None:
        """Send what is due and leave where patience is over."""
        while self._next < len(self._order) and self.specs[self._order[self._next]].arrival <= now:
            self._send(self._order[self._next])
            self._next += 1
        while self._departures and self._departures[0][0] <= now:
            self.engine.cancel(heapq.heappop(self._departures)[1])

    def next_event(self) -> float:
        """When `act` will have something to do; infinity when never again."""
        arrival = self.specs[self._order[self._next]].arrival if self._next < len(self._order) else float("inf")
        return min(arrival, self._departures[0][0]) if self._departures else arrival

    def read(self, emissions: Sequence[Emission], now: float) -> None:
        times = self._times
        for emission in emissions:
            id = emission.request.id
            if emission.token is not None:
                times[id].append(now)
            if emission.finish_reason is not None:
                self._close(int(id), tuple(times.pop(id)), _error(emission))

    def _send(self, index: int) -> None:
        spec = self.specs[index]
        prompt = prompt_tokens(spec, index, self.engine.vocab_size)
        params = _params(spec, self.engine.vocab_size)
        rate = spec.declared_rate or spec.stream_rate or DEFAULT_RATE
        request = Request.create(
            str(index), prompt, params, arrival=spec.arrival, stream_rate=rate,
            segments=tuple(part.segment for part in spec.segments), round=spec.round,
        )  # fmt: skip
        try:
            self.engine.add(request)
        except RequestError as error:
            self._close(index, (), f"refused: {error.code or error}")
            return
        self._times[request.id] = []
        if spec.leaves_after is not None:
            heapq.heappush(self._departures, (spec.arrival + spec.leaves_after, request.id))

    def _close(self, index: int, token_times: tuple[float, ...], error: str | None) -> None:
        spec = self.specs[index]
        record = RequestRecord(spec.arrival, spec.prompt_tokens, token_times, spec.stream_rate, error)
        self.records[index] = record
        self.on_done(record)


def run(
    engine: Engine, specs: Sequence[RequestSpec], *, on_done: Callable[[RequestRecord], None] = lambda record: None
) -> Run:
    """Serve the whole workload. `engine.clock` must be a `VirtualClock` that the executor moves.

    Each request ends exactly once: `on_done` hears of it, and its record is in the result. Raises RuntimeError when
    the engine lets requests wait for ever.
    """
    clients, load = _Readers(engine, specs, on_done), LoadSeries()
    play(engine, clients, load.note)
    return Run([record for record in clients.records if record is not None], load)


def play(engine: Engine, clients: Clients, on_step: Callable[[Engine, float], None]) -> None:
    """Let clients and engine work until nobody wants anything any more; `on_step` hears of each step that computed.

    Raises TypeError without a `VirtualClock`, RuntimeError when the engine lets requests wait for ever.
    """
    clock = engine.clock
    if not isinstance(clock, VirtualClock):
        raise TypeError(f"the engine's clock is a {type(clock).__name__}; a simulation needs a VirtualClock")
    with _rare_collections():
        _play(engine, clock, clients, on_step)


def _play(engine: Engine, clock: VirtualClock, clients: Clients, on_step: Callable[[Engine, float], None]) -> None:
    last_progress = clock.now()
    while True:
        before = clock.now()
        clients.act(before)
        if not engine.has_work:
            if clients.next_event() == float("inf"):
                while engine.settle() and engine.tiers is not None and engine.tiers.copying:
                    engine.tiers.wait(_IDLE_SECONDS)
                break
            until = min(clients.next_event(), before + _TEND_SECONDS) if engine.settle() else clients.next_event()
            clock.advance(until - before)
            last_progress = clock.now()
            continue
        emissions = engine.step()
        now = clock.now()
        clients.read(emissions, now)
        if now > before:
            on_step(engine, now)
            last_progress = now
        elif not emissions:
            events = (clients.next_event(), engine.wake_at, before + _IDLE_SECONDS)
            clock.advance(min(moment for moment in events if moment > before) - before)
            if before - last_progress > _STUCK_SECONDS:
                raise RuntimeError(f"the engine computed nothing for {_STUCK_SECONDS:g} s while requests waited")


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for garbage seldom: every step makes thousands of short-lived objects, and none of them in cycles."""
    usual = gc.get_threshold()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


def _params(spec: RequestSpec, vocabulary: int) -> SamplingParams:
    """What makes a simulated text end where the workload says: its length if the client asks for just that, else the
    token that comes there."""
    length = spec.output_tokens
    if spec.max_tokens is None:
        return SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
    end = token_at(spec.prompt_tokens + length - 1, vocabulary)
    return SamplingParams(
        temperature=0.0, max_tokens=spec.max_tokens, min_tokens=length - 1, stop_token_ids=(end,), ignore_eos=True
    )


def _error(emission: Emission) -> str | None:
    if emission.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
        return None
    return LEFT if emission.finish_reason is FinishReason.CANCELLED else emission.error or str(emission.finish_reason)
