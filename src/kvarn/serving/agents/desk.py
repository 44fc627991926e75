"""All tool calls and programs that the engine knows of: takes requests' comings and goings and clients' events.

It answers what has become of a call, and tells the engine which conversations to hold and which to let go; where their
KV is held is decided by a policy and done by `kvarn.serving.stalls`. Nothing here is needed for a correct answer: a
call that is unknown, late or lost costs a recomputation.

Ended requests are remembered for a minute, for calls that begin after their answer has been read; calls that are over,
for events that come late or twice.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from kvarn.errors import RequestError
from kvarn.serving.agents.events import AgentEvent, CallFinish, CallProgress, CallReport, CallStart, Close
from kvarn.serving.agents.forecast import Forecast, Forecaster, of_fraction, of_rest
from kvarn.serving.agents.hints import UNKNOWN, AgentHints
from kvarn.serving.agents.lifecycle import Call, CallState
from kvarn.serving.agents.programs import Comer, Programs

_SHORTEST_DEADLINE, _LONGEST_DEADLINE = 60.0, 3600.0
_DEADLINE_FORECASTS = 4.0
"""A call is given up after so many times its forecast, within these bounds."""
ANSWER_WINDOW = 60.0
"""Seconds after an answer in which its tool call may begin."""
_TOMBSTONE = 60.0
_FORGOTTEN = 30.0
"""Seconds that the KV of a conversation is held for a request that does not come after its tool has answered."""
LONGEST_RETENTION = 3600.0
_LOOK_SECONDS = 0.25
_MOST_TURNS = 4096
_MOST_CALLS = 4096
"""Calls held at once; a client that begins more has its oldest ones let go."""
_TENANT_CALLS = 2048
"""Of one tenant."""


class Turn(Comer, Protocol):
    """An ended request, as far as it matters here (kvarn.serving.request.Request satisfies it)."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def retain_seconds(self) -> float: ...


T = TypeVar("T", bound=Turn)


@dataclass(slots=True)
class DeskCounters:
    """Totals since start."""

    started: int = 0
    finished: int = 0
    expired: int = 0
    """Calls given up at their deadline."""
    continued: int = 0
    """Calls that a request went on from."""
    found: Counter[CallState] = field(default_factory=Counter)
    """Where the KV was when that request came."""


class Desk(Generic[T]):
    """Calls by the id of the request that made them. Pure: `now` comes in, what is to be held comes out."""

    def __init__(self, forecaster: Forecaster | None = None) -> None:
        self.forecaster = forecaster or Forecaster()
        self.programs = Programs()
        self.calls: dict[str, Call] = {}
        """Those that are not over."""
        self.counters = DeskCounters()
        self._stages: dict[str, tuple[tuple[str, ...], int, float]] = {}
        """Of a call in stages: their names, the one it is in, and since when."""
        self._turns: OrderedDict[str, tuple[float, T]] = OrderedDict()
        """Ended requests and when."""
        self._early: OrderedDict[str, CallStart] = OrderedDict()
        """Calls announced before their requests ended."""
        self._running: dict[str, str] = {}
        """Requests that have not ended, and their tenants."""
        self._look_at = float("-inf")
        self._tombs: OrderedDict[str, tuple[float, Call]] = OrderedDict()
        self._successors: dict[str, str] = {}
        """Waiting request -> the call that it goes on from."""
        self._closed: OrderedDict[tuple[str, str], float] = OrderedDict()
        """Tenants and programs of theirs that were closed, and when."""

    # ---- requests ----------------------------------------------------------------------------------------

    def note_added(self, request: Turn, now: float, *, prefix_of: str = "") -> None:
        """A request has come; `prefix_of`: a call whose conversation it begins with, where it names none itself."""
        self._running[request.id] = request.tenant
        call = self.calls.get(request.continues) or self.calls.get(prefix_of)
        if call is not None and call.tenant != request.tenant:
            call = None
        self.programs.note_added(request, now, "" if call is None else call.id)
        if call is None or call.successor:
            return
        self._finish(call, now, UNKNOWN)
        self.counters.found[call.state] += 1
        call.successor = request.id
        self._successors[request.id] = call.id

    def note_ended(self, request: T, now: float, *, goes_on: bool) -> Call | None:
        """A request has ended, `goes_on`: so that its conversation may be gone on with. The call to hold it for, if
        one begins with that."""
        self._running.pop(request.id, None)
        self.give_back(request.id)
        early = self._early.pop(request.id, None)
        self.programs.note_ended(request, now)
        if not goes_on:
            return None
        self._turns[request.id] = (now, request)
        while len(self._turns) > _MOST_TURNS:
            self._turns.popitem(last=False)
        if early is not None:
            return self._begin(request, early, now)
        if request.retain_seconds > 0:
            return self._retain(request, now)
        return None

    def turn(self, id: str) -> T | None:
        """The ended request of this id, while it is remembered."""
        found = self._turns.get(id)
        return found[1] if found else None

    def call_of(self, request_id: str) -> Call | None:
        """The call that a waiting request goes on from."""
        return self.calls.get(self._successors.get(request_id, ""))

    def give_back(self, request_id: str) -> None:
        """A request that goes on from a call has ended before it ran: another may."""
        call = self.calls.get(self._successors.pop(request_id, ""))
        if call is not None:
            call.successor = ""

    def taken_over(self, request: Turn, now: float) -> Call | None:
        """A request runs now, with what there is of the conversation: the call that is over thereby."""
        call = self.calls.get(self._successors.pop(request.id, ""))
        if call is not None:
            self.counters.continued += 1
            self._bury(call, now)
        return call

    # ---- events ------------------------------------------------------------------------------------------

    def handle(self, event: AgentEvent, now: float) -> tuple[CallReport, tuple[Call, T] | None, list[Call]]:
        """An event of a client: what to answer, a call that began with the request that made it, those that are over.

        RequestError: 404 for what is unknown, 409 for what contradicts what is known, 400 for what makes no sense.
        """
        match event:
            case CallStart():
                report, begun = self._start(event, now)
                return report, begun, []
            case CallProgress():
                return self._progress(event, now), None, []
            case CallFinish():
                call = self._call(event.request, event.tenant)
                if call.state is not CallState.DEAD:
                    self._finish(call, now, event.seconds)
                return self.report(call, now), None, []
            case Close():
                return self._close(event, now)

    def expire(self, now: float) -> list[Call]:
        """Calls whose time is over; forget what need not be remembered any longer. Looks a few times a second."""
        if now < self._look_at:
            return []
        self._look_at = now + _LOOK_SECONDS
        while self._turns and next(iter(self._turns.values()))[0] < now - ANSWER_WINDOW:
            self._turns.popitem(last=False)
        while self._tombs and next(iter(self._tombs.values()))[0] < now - _TOMBSTONE:
            self._tombs.popitem(last=False)
        while self._closed and next(iter(self._closed.values())) < now - _TOMBSTONE:
            self._closed.popitem(last=False)
        over = [call for call in self.calls.values() if call.deadline <= now and not call.successor]
        for call in over:
            self.counters.expired += not (call.finished or call.retained)
            self._bury(call, now)
        return over

    def report(self, call: Call, now: float) -> CallReport:
        """Where a call stands, for its client."""
        return CallReport(
            request=call.id,
            state=call.state.value,
            expected_seconds=call.first_forecast.seconds,
            remaining_seconds=call.remaining(now),
            deadline_seconds=max(0.0, call.deadline - now),
            elapsed_seconds=min(now, call.finished_at) - call.started,
        )

    # ---- small parts -------------------------------------------------------------------------------------

    def _start(self, event: CallStart, now: float) -> tuple[CallReport, tuple[Call, T] | None]:
        call = self.calls.get(event.request) or self._tomb(event.request)
        if call is not None and call.tenant == event.tenant:
            self._start_again(call, event, now)
            return self.report(call, now), None
        turn = self.turn(event.request)
        if turn is not None and turn.tenant == event.tenant:
            begun = self._begin(turn, event, now)
            return self.report(begun, now), (begun, turn)
        if self._running.get(event.request) == event.tenant:
            before = self._early.get(event.request)
            if before is not None and not (before.implicit or event.implicit) and before.tool != event.tool:
                raise _conflict(f"the call is announced already, of the tool {before.tool!r}", "tool")
            self._early[event.request] = event
            return CallReport(event.request, "announced", event.seconds), None
        raise _unknown(event.request)

    def _start_again(self, call: Call, event: CallStart, now: float) -> None:
        """The same start once more may add what was not known; another one is refused."""
        if event.implicit:
            return
        if call.explicit and event.tool and call.tool and event.tool != call.tool:
            raise _conflict(f"the call has begun already, of the tool {call.tool!r}", "tool")
        if call.state is CallState.DEAD or call.finished:
            if call.explicit:
                return  # the first one, late
            raise _conflict("the call is over: its tool has answered", "request")
        known = call.explicit
        self.counters.started += call.retained
        call.explicit, call.retained = True, False
        if not known:
            call.tool = event.tool or call.tool
            self._predict(call, event, now - call.started)

    def _begin(self, turn: Turn, event: CallStart, now: float) -> Call:
        self.programs.adopt(turn, now)
        agent = turn.agent or AgentHints()
        tool = event.tool or agent.tool
        call = Call(
            turn.id, turn.tenant, agent, tool, now, Forecast(1.0), now, turn.num_tokens,
            explicit=not event.implicit, moved_at=now,
        )  # fmt: skip
        self._predict(call, event, 0.0)
        self.counters.started += 1
        return self._keep(call)

    def _retain(self, turn: Turn, now: float) -> Call:
        self.programs.adopt(turn, now)
        seconds = min(turn.retain_seconds, LONGEST_RETENTION)
        agent = turn.agent or AgentHints()
        forecast = Forecast(seconds, (1.0,))
        call = Call(
            turn.id, turn.tenant, agent, "", now, forecast, now + seconds, turn.num_tokens, retained=True, moved_at=now
        )
        return self._keep(call)

    def _keep(self, call: Call) -> Call:
        """Among the calls; where one tenant has too many, or all have, the oldest are next to be let go."""
        self._turns.pop(call.id, None)
        self.calls[call.id] = call
        everybody = list(self.calls.values())
        mine = [other for other in everybody if other.tenant == call.tenant]
        for other in (*mine[: max(0, len(mine) - _TENANT_CALLS)], *everybody[: max(0, len(everybody) - _MOST_CALLS)]):
            other.deadline = min(other.deadline, call.started)
        return call

    def _predict(self, call: Call, event: CallStart, elapsed: float) -> None:
        estimate = event.seconds if event.seconds >= 0 else call.agent.tool_seconds
        forecast = self.forecaster.forecast(
            call.tenant, call.agent.agent, call.tool, estimate if estimate >= 0 else None
        )
        if event.stages:
            self._stages[call.id] = (event.stages, 0, call.started + elapsed)
            known = self._stage_seconds(call, event.stages)
            if known is not None and estimate < 0:
                forecast = of_rest(known, 0.0, forecast)
        call.forecast = call.first_forecast = forecast
        longest = _DEADLINE_FORECASTS * forecast.seconds
        call.deadline = call.started + min(_LONGEST_DEADLINE, max(_SHORTEST_DEADLINE, longest))

    def _stage_seconds(self, call: Call, stages: Iterable[str]) -> float | None:
        """What these stages have lately taken together; None unless all are known."""
        known = [self.forecaster.seconds(call.tenant, "", f"{call.tool}/{stage}") for stage in stages]
        return sum(filter(None, known)) if all(each is not None for each in known) else None

    def _progress(self, event: CallProgress, now: float) -> CallReport:
        call = self._call(event.request, event.tenant)
        if call.finished or call.state is CallState.DEAD:
            raise _conflict("the call is over: its tool has answered", "request")
        elapsed = now - call.started
        if event.stage:
            self._come_to(call, event.stage, now)
        elif 0.0 <= event.fraction <= 1.0:
            if event.fraction > 0.0:
                call.forecast = of_fraction(elapsed, min(event.fraction, 0.999))
        else:
            raise RequestError("call_progress needs a stage, or a fraction from 0 to 1", field="fraction")
        longest = _DEADLINE_FORECASTS * call.forecast.seconds
        call.deadline = max(call.deadline, now + min(_LONGEST_DEADLINE, longest))
        return self.report(call, now)

    def _come_to(self, call: Call, stage: str, now: float) -> None:
        stages, current, since = self._stages.get(call.id, ((), 0, now))
        if stage not in stages:
            known = ", ".join(stages) or "none"
            raise RequestError(f"stage is {stage!r}; the call began with these: {known}", field="stage")
        reached = stages.index(stage)
        if reached <= current:
            return  # told before
        if reached == current + 1:  # else it took several together
            self._learn_stage(call, stages[current], now - since)
        self._stages[call.id] = (stages, reached, now)
        rest = self._stage_seconds(call, stages[reached:])
        if rest is None:  # as if all stages were equally long
            elapsed = now - call.started
            rest = max(call.remaining(now), elapsed * (len(stages) - reached) / max(reached, 1))
        call.forecast = of_rest(rest, now - call.started, call.forecast)

    def _learn_stage(self, call: Call, stage: str, seconds: float) -> None:
        name = f"{call.tool}/{stage}"
        self.forecaster.learn(call.tenant, "", name, self.forecaster.forecast(call.tenant, "", name), seconds)

    def _finish(self, call: Call, now: float, seconds: float) -> None:
        """The tool has answered; again is nothing new."""
        if call.finished:
            return
        call.finished_at = now
        call.deadline = now + _FORGOTTEN
        if not call.retained:
            self.counters.finished += 1
            took = seconds if seconds >= 0 else now - call.started
            self.forecaster.learn(call.tenant, call.agent.agent, call.tool, call.first_forecast, took)
        stages, current, since = self._stages.pop(call.id, ((), 0, now))
        if stages and current == len(stages) - 1:
            self._learn_stage(call, stages[current], now - since)

    def _close(self, event: Close, now: float) -> tuple[CallReport, None, list[Call]]:
        if not event.request and not event.program:
            raise RequestError("close needs a request or a program", field="request")
        over = [
            call
            for call in self.calls.values()
            if call.tenant == event.tenant
            and (call.id == event.request or (event.program and self._program(call) == event.program))
        ]
        turn, tomb = self.turn(event.request), self._tomb(event.request)
        known = event.tenant in [each.tenant for each in (turn, tomb) if each is not None]
        if self._running.get(event.request) == event.tenant:
            known = True
            self._early.pop(event.request, None)
        program = (event.tenant, event.program)
        known |= self.programs.close(*program) or program in self._closed
        if not over and not known:
            raise _unknown(event.request or event.program)
        if event.program:
            self._closed[program] = now
            self._closed.move_to_end(program)
        for call in over:
            self._bury(call, now)
        self._turns.pop(event.request, None)
        return CallReport(event.request or event.program, CallState.DEAD.value, closed=len(over)), None, over

    def _call(self, id: str, tenant: str) -> Call:
        call = self.calls.get(id) or self._tomb(id)
        if call is not None and call.tenant == tenant:
            return call
        turn = self.turn(id)
        if self._running.get(id) == tenant or (turn is not None and turn.tenant == tenant):
            raise _conflict("no tool call of this request has begun; send call_start first", "request")
        raise _unknown(id)

    def _program(self, call: Call) -> str:
        """The name of the program that a call is part of, whether its own hints say it or those before it."""
        program = self.programs.of(call.id)
        return call.agent.program if program is None else program.id

    def _tomb(self, id: str) -> Call | None:
        found = self._tombs.get(id)
        return found[1] if found else None

    def _bury(self, call: Call, now: float) -> None:
        """Over: the engine lets go of what it holds, and the call is remembered for a while."""
        del self.calls[call.id]
        self._stages.pop(call.id, None)
        self._successors.pop(call.successor, None)
        call.move_to(CallState.DEAD, now)
        self._tombs[call.id] = (now, call)


def _unknown(id: str) -> RequestError:
    return RequestError(
        f"no request {id[:80]!r} is waiting for a tool here; it may be too long ago, or from before a restart: go on "
        "without events",
        field="request",
        code="not_found",
        status=404,
    )


def _conflict(why: str, field: str) -> RequestError:
    return RequestError(why, field=field, code="conflict", status=409)
