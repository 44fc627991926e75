"""A stand-in for the engine process: speaks the same messages, computes nothing, says back what it was told.

A conversation is answered with its last message, a plain prompt with itself, one token a step; then comes the end of
the text, unless the request ignores it: then it goes round and round. Its log (a JSON line an event, in the file named
by KVARN_STANDIN_LOG) shows tests what the API process said to it. Tests that need a model use the real engine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq

from kvarn.serving.agents.events import AgentEvent, CallFinish, CallReport, CallStart, Close
from kvarn.serving.agents.hints import UNKNOWN, AgentHints
from kvarn.serving.api.messages import (
    Acknowledge,
    AgentsReport,
    AgentStats,
    Cancel,
    EngineStats,
    FromEngine,
    Loading,
    NodeReport,
    ProgramReport,
    Ready,
    RoundsReport,
    Shutdown,
    StartFailed,
    StepOutputs,
    StreamReport,
    StreamsReport,
    Submit,
    Tell,
    ToEngine,
    TokenOutput,
    Told,
    Watch,
    WatchAgents,
    WatchRounds,
)
from kvarn.serving.batch import TokenLogprobs
from kvarn.serving.rounds_report import RoundFacts, RoundReport

STEP_SECONDS = float(os.environ.get("KVARN_STANDIN_STEP", "0.001"))
LOG = os.environ.get("KVARN_STANDIN_LOG")
START_FAILURE = os.environ.get("KVARN_STANDIN_START_FAILURE")
MAX_CONTEXT = int(os.environ.get("KVARN_STANDIN_CONTEXT", "1024"))
CACHED = 16
"""Prompt tokens that every prompt of so many claims to have found in the cache."""
MUTE = "mute-0"
"""A request that events of are never answered."""
TWICE = "twice"
"""An agent that every round has already."""
START, END = 1, 2
"""SmolLM2's marks around a message; END also ends a text."""


def log(event: str, **facts: object) -> None:
    if LOG:
        with Path(LOG).open("a") as file:
            file.write(json.dumps({"event": event, "pid": os.getpid(), **facts}) + "\n")


def script(prompt: list[int]) -> list[int]:
    """The tokens to answer with."""
    if START not in prompt:
        return [*prompt, END]
    end = len(prompt) - 1 - prompt[::-1].index(END)
    start = end - 1 - prompt[:end][::-1].index(START)
    return prompt[start + 3 : end + 1]  # without the mark, the role and the line's end


def facts_of(event: AgentEvent) -> dict[str, object]:
    return msgspec.to_builtins(msgspec.structs.asdict(event))


def event_seconds(event: AgentEvent) -> float:
    return event.seconds if isinstance(event, CallStart) else UNKNOWN


@dataclass
class Running:
    submit: Submit
    script: list[int]
    deadline: float
    sent: int = 0

    def step(self) -> TokenOutput:
        params = self.submit.params
        token = self.script[self.sent % len(self.script)]
        output = TokenOutput(self.submit.id, [token])
        if self.sent == 0:
            output.cached_tokens = min(CACHED, len(self.submit.prompt) // 16 * 16)
            output.reused_tokens = sum(each.tokens for each in self.submit.segments if each.kind == "shared")
        self.sent += 1
        if params.logprobs >= 0:
            output.logprobs = [TokenLogprobs(-0.5, [(token + 1 + i, -1.0 - i) for i in range(params.logprobs)])]
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else (END,))}
        if token in ends and self.sent > params.min_tokens:
            output.finish_reason = "stop"
        elif self.sent >= params.max_tokens:
            output.finish_reason = "length"
        elif time.monotonic() > self.deadline:
            output.finish_reason = "deadline"
        return output

    def report(self) -> StreamReport:
        submit = self.submit
        counts = {"prompt_tokens": len(submit.prompt), "output_tokens": self.sent}
        reader = {"rate": submit.stream_rate, "unread_tokens": 0, "slack": 0.0, "stalls": 0, "stall_seconds": 0.0}
        places = {"blocks": 4, "device_blocks": 3, "host_blocks": 2, "disk_blocks": 1}
        return StreamReport(
            submit.id, "running", False, 1.0, max_output_tokens=9, preemptions=0, **counts, **reader, **places
        )


class StandIn:
    def __init__(self, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> None:
        self.inbox = inbox
        self.outbox = outbox
        self.running: dict[str, Running] = {}
        self.decoder = msgspec.msgpack.Decoder(ToEngine)
        self.alive = True
        self.calls: dict[tuple[str, str], str] = {}
        """(tenant, request) -> what its tool call does, of requests that may make one."""
        self.output_tokens = 0
        self.rounds: list[RoundReport] = []

    def send(self, message: FromEngine) -> None:
        self.outbox.send(msgspec.msgpack.encode(message))

    def handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                if message.may_call:
                    self.calls[message.tenant, message.id] = "answered"
                facts = msgspec.structs.asdict(message)
                log("submit", **msgspec.to_builtins(facts, str_keys=True))
                if message.params.grammar is not None and "impossible" in message.params.grammar.source:
                    refusal = TokenOutput(
                        message.id, [], "error", error="no such grammar", error_field="response_format"
                    )
                    self.send(StepOutputs([refusal]))
                elif message.round is not None and message.round.agent == TWICE:
                    words = f"the round {message.round.id!r} has a request of {TWICE!r} already"
                    refusal = TokenOutput(
                        message.id, [], "error", error=words, error_field="round.agent", error_status=409
                    )
                    self.send(StepOutputs([refusal]))
                else:
                    self.note_round(message)
                    self.running[message.id] = Running(
                        message, script(message.prompt), time.monotonic() + message.timeout
                    )
            case Cancel():
                log("cancel", id=message.id)
                self.running.pop(message.id, None)
            case Acknowledge():
                log("acknowledge", id=message.id, tokens=message.tokens, fastest=message.fastest)
            case Watch():
                log("watch", limit=message.limit)
                told = [request.report() for request in self.running.values()][: message.limit]
                self.send(StreamsReport(EngineStats(running=len(self.running)), 0, told))
            case WatchAgents():
                log("watch_agents", limit=message.limit)
                self.send(self.report_agents(message.limit))
            case WatchRounds():
                log("watch_rounds", limit=message.limit)
                self.send(RoundsReport(EngineStats(rounds=self.round_facts()), self.rounds[: message.limit]))
            case Tell():
                log("tell", number=message.number, kind=type(message.event).__name__, **facts_of(message.event))
                told = self.tell(message)
                if message.number and message.event.request != MUTE:
                    self.send(told)
            case Shutdown():
                log("shutdown")
                self.alive = False

    def round_facts(self) -> RoundFacts:
        """One waits once there are rounds."""
        reused = sum(each.reused_tokens for each in self.rounds)
        return RoundFacts(
            len(self.rounds), waiting_members=len(self.rounds[:1]), reused_tokens=reused, segment_bytes=4096
        )

    def note_round(self, message: Submit) -> None:
        if message.round is not None:
            shared = [each.tokens for each in message.segments if each.kind == "shared"]
            round = message.round
            self.rounds.insert(0, RoundReport(round.id, round.size, 1, 0.25, "collective", len(shared), sum(shared), 2))

    def report_agents(self, limit: int) -> AgentsReport:
        """A program for each request that may call."""
        programs = []
        for (_, id), state in [*self.calls.items()][:limit]:
            hints = AgentHints(agent="coder", after=("planner",), critical=True)
            call = CallReport(id, "kept", 3.0, 2.0, 60.0, 4, elapsed_seconds=1.0) if state == "calling" else None
            node = NodeReport(id, id, hints, state if call else "ended", "weather", call, 5, 4, 3, 2, 1, 2.5, 70)
            programs.append(ProgramReport(f"of {id}", 2.0, 1.0, 10.0, UNKNOWN, 8.0, [node]))
        return AgentsReport(EngineStats(agents=self.agent_stats()), {"stalled": 7, "free": 57}, programs)

    def agent_stats(self) -> AgentStats:
        return AgentStats(len(self.calls), {"kept": len(self.calls)}, held_blocks=7, started=2, on_time_uploads=1)

    def tell(self, message: Tell) -> Told:
        """Starts, progress and finish in this order, each any number of times; what is unknown is not found."""
        event = message.event
        key = (event.tenant, event.request)
        state = self.calls.get(key)
        if state is None:
            return Told(message.number, None, f"no request {event.request!r} here", "request", 404)
        also = "answered" if isinstance(event, CallStart) else "over" if isinstance(event, CallFinish) else ""
        if not isinstance(event, Close) and state not in ("calling", also):
            return Told(message.number, None, "no call goes on", "request", 409)
        if isinstance(event, Close):
            del self.calls[key]
            return Told(message.number, CallReport(event.request, "dead", closed=1))
        self.calls[key] = "over" if isinstance(event, CallFinish) else "calling"
        return Told(message.number, CallReport(event.request, self.calls[key], event_seconds(event), held_blocks=3))

    def serve(self) -> None:
        while self.alive:
            if not self.running:
                self.inbox.poll(1000)
            while self.inbox.poll(0):
                self.handle(self.decoder.decode(self.inbox.recv()))
            outputs = [request.step() for request in self.running.values()]
            self.output_tokens += len(outputs)
            for output in outputs:
                if output.finish_reason is not None:
                    del self.running[output.id]
            if outputs:
                stats = EngineStats(
                    running=len(self.running),
                    blocks_free=7,
                    output_tokens=self.output_tokens,
                    agents=self.agent_stats(),
                    rounds=self.round_facts(),
                )
                self.send(StepOutputs(outputs, stats))
                time.sleep(STEP_SECONDS)


def end_with_parent() -> None:
    os.read(0, 1)  # not through sys.stdin, whose lock would be held when the interpreter ends
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--to-engine", "--from-engine", "--config"):
        parser.add_argument(name, required=True)
    arguments = parser.parse_args()
    threading.Thread(target=end_with_parent, daemon=True).start()
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(arguments.to_engine)
    outbox.connect(arguments.from_engine)
    standin = StandIn(inbox, outbox)
    log("start", config=json.loads(arguments.config))
    standin.send(Loading("warming up", 0.5))
    if START_FAILURE:
        standin.send(StartFailed(START_FAILURE))
        context.destroy(linger=1000)
        return 2
    standin.send(Ready(MAX_CONTEXT, 49152, 64, 16, "nowhere", "none", "none", 0.0))
    standin.serve()
    context.destroy(linger=1000)
    return 0


if __name__ == "__main__":
    sys.exit(main())
