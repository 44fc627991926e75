"""Plays programs on an engine with a virtual clock: `ProgramSpec`s in, an `AgentRun` out.

Each model call is a request; when one that a tool call follows has ended, the engine hears of it in the same instant,
the tool sleeps on the virtual clock, and what comes next is asked the moment it returns. A program in which a request
fails has failed; the others go on.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence

from kvarn.errors import RequestError
from kvarn.serving.agents.events import AgentEvent, CallFinish, CallStart, Close
from kvarn.serving.engine import Emission, Engine
from kvarn.serving.request import FinishReason, Request
from kvarn.serving.sampling.params import SamplingParams
from kvarn.simulation.agents.programs import ProgramSpec
from kvarn.simulation.agents.progress import Action, Ask, Events, ProgramRun, Run, Texts
from kvarn.simulation.agents.report import AgentRun, BlockSeries, CallRecord, ProgramRecord, ToolRecord
from kvarn.simulation.runner import play


def play_programs(
    engine: Engine,
    specs: Sequence[ProgramSpec],
    *,
    events: Events = Events.explicit,
    hints: bool = True,
    on_done: Callable[[ProgramRecord], None] = lambda record: None,
) -> AgentRun:
    """Play all programs to their ends; `on_done` hears of each. `engine.clock` must be a `VirtualClock`.

    Raises RuntimeError when the engine lets requests wait for ever.
    """
    players, blocks = _Players(engine, specs, events, hints, on_done), BlockSeries()
    play(engine, players, blocks.note)
    return AgentRun(players.programs, players.calls, players.tools, blocks, dict(players.refused))


class _Players:
    """All programs' clients at once: `Clients` of kvarn.simulation.runner."""

    def __init__(
        self,
        engine: Engine,
        specs: Sequence[ProgramSpec],
        events: Events,
        hints: bool,
        on_done: Callable[[ProgramRecord], None],
    ) -> None:
        self.engine = engine
        self.programs: list[ProgramRecord] = []
        self.calls: list[CallRecord] = []
        self.tools: list[ToolRecord] = []
        self.refused: Counter[str] = Counter()
        self._events = events
        self._hints = hints
        self._on_done = on_done
        texts = Texts(0, engine.vocab_size)
        self._runs = {spec.id: ProgramRun(spec, texts) for spec in specs}
        self._arrivals = sorted(((spec.arrival, spec.id) for spec in specs), reverse=True)
        self._asked: dict[str, tuple[ProgramRun, Request, CallRecord]] = {}
        """Of requests that the engine has."""
        self._turns: dict[tuple[str, str], str] = {}
        """(program, node) -> the first call of its agent's turn."""
        self._sleeping: list[tuple[float, int, ProgramRun, Run]] = []
        self._count = 0
        self._failed: set[str] = set()

    def act(self, now: float) -> None:
        # Things were due at moments within the step that has just ended: that is when they have happened.
        while self._arrivals and self._arrivals[-1][0] <= now:
            due, id = self._arrivals.pop()
            self._do(self._runs[id], self._runs[id].start(), due)
        while self._sleeping and self._sleeping[0][0] <= now:
            due, _, run, tool = heapq.heappop(self._sleeping)
            self._return(run, tool, due)

    def next_event(self) -> float:
        arrival = self._arrivals[-1][0] if self._arrivals else float("inf")
        return min(arrival, self._sleeping[0][0]) if self._sleeping else arrival

    def read(self, emissions: Sequence[Emission], now: float) -> None:
        for emission in emissions:
            run, request, record = self._asked[emission.request.id]
            if emission.token is not None and not record.first_token:
                record.first_token = now
            if emission.finish_reason is None:
                continue
            del self._asked[request.id]
            record.end = now
            record.cached_tokens = request.cached_tokens
            record.output_tokens, record.preemptions = request.num_outputs, request.preemptions
            if emission.finish_reason is FinishReason.LENGTH:
                output = request.tokens[request.prompt_length : request.num_tokens]
                self._do(run, run.answered(record.node, output), now)
                if run.done:
                    self._end(run, now)
            elif run.spec.id not in self._failed:
                self._end(run, now, error=emission.error or str(emission.finish_reason))

    def _do(self, run: ProgramRun, actions: Sequence[Action], now: float) -> None:
        for action in actions:
            if run.spec.id in self._failed:
                return
            if isinstance(action, Ask):
                self._ask(run, action, now)
            else:
                self._call(run, action, now)

    def _ask(self, run: ProgramRun, ask: Ask, now: float) -> None:
        program = run.spec.id
        turn = self._turns[program, ask.node] = self._turns[program, ask.continues] if ask.answers else ask.node
        record = CallRecord(program, ask.node, ask.agent, turn, now, prompt_tokens=len(ask.prompt))
        self.calls.append(record)
        request = Request.create(
            f"{program}/{ask.node}",
            ask.prompt,
            SamplingParams(temperature=0.0, max_tokens=ask.output_tokens, ignore_eos=True),
            arrival=now,
            agent=ask.hints if self._hints else None,
            continues=f"{program}/{ask.continues}" if ask.answers and self._events is not Events.none else "",
        )
        try:
            self.engine.add(request)
        except RequestError as error:
            record.end = now
            self._end(run, now, error=f"refused: {error.code or error}")
            return
        self._asked[request.id] = (run, request, record)

    def _call(self, run: ProgramRun, tool: Run, now: float) -> None:
        request = f"{run.spec.id}/{tool.caller}"
        if self._events is Events.implicit:
            self._tell(CallStart(request, tool=tool.kind, implicit=True))
        else:
            self._tell(CallStart(request, tool=tool.kind, seconds=tool.predicted_seconds, stages=tool.stages))
        self.tools.append(
            ToolRecord(run.spec.id, tool.node, tool.kind, tool.caller, now, now + tool.seconds, tool.predicted_seconds)
        )
        self._count += 1
        heapq.heappush(self._sleeping, (now + tool.seconds, self._count, run, tool))

    def _return(self, run: ProgramRun, tool: Run, now: float) -> None:
        if run.spec.id in self._failed:
            return
        if self._events is Events.explicit:
            self._tell(CallFinish(f"{run.spec.id}/{tool.caller}", seconds=tool.seconds))
        self._do(run, run.returned(tool.node), now)
        if run.done:
            self._end(run, now)

    def _tell(self, event: AgentEvent) -> None:
        if self._events is Events.none:
            return
        try:
            self.engine.agent_event(event)
        except RequestError as error:
            self.refused[f"{type(event).__name__}: {error.status} {error.code or error}"] += 1

    def _end(self, run: ProgramRun, now: float, error: str | None = None) -> None:
        program = run.spec.id
        if self._hints:
            self._tell(Close(program=program))
        if error is not None:
            self._failed.add(program)
            for other, request, _ in list(self._asked.values()):
                if other is run:
                    self.engine.cancel(request.id)
        record = ProgramRecord(program, run.spec.app, run.spec.arrival, now, run.digest(), error)
        self.programs.append(record)
        self._on_done(record)
