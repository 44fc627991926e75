"""The line to one engine process: sockets, the requests in flight over it, and where each one's news goes.

Requests go out as `Submit`/`Cancel`; `StepOutputs` come in and are dropped into `Mailbox`es, one an HTTP request
whatever its number of sequences. When the process dies every mailbox gets the error at once. A new process gets
a new link: nothing said to a dead one can reach its successor.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from kvarn.serving.agents.events import AgentEvent
from kvarn.serving.api.messages import (
    Acknowledge,
    AgentsReport,
    Cancel,
    EngineStats,
    FromEngine,
    Ready,
    RoundsReport,
    Shutdown,
    StepOutputs,
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
from kvarn.serving.api.speed import Speed

LONGEST_FOLDER = 70
"""Characters of the temporary folder's path that leave room for ours: a socket's path may have about 100."""


class Mailbox:
    """News for one reader, in order of arrival. `put` and `fail` never wait; `get` takes all there is."""

    __slots__ = ("_error", "_news", "_waiter")

    def __init__(self) -> None:
        self._news: list[TokenOutput] = []
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: TokenOutput) -> None:
        self._news.append(output)
        self._wake()

    def fail(self, error: BaseException) -> None:
        """After the news already here, `get` raises `error`, now and ever after. The first failure counts."""
        if self._error is None:
            self._error = error
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> list[TokenOutput]:
        """All news since the last call, at least one. Raises what `fail` was given."""
        if not self._news and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._news:
            news, self._news = self._news, []
            return news
        assert self._error is not None
        raise self._error


class EngineLink:
    """Sockets to one engine process and the mailboxes of its requests. Used from the event loop only."""

    def __init__(self) -> None:
        self.ready: Ready | None = None
        self.stats = EngineStats()
        self._mailboxes: dict[str, Mailbox] = {}
        self._unstarted: set[str] = set()
        self._questions: deque[asyncio.Future[Any]] = deque()
        self._told: dict[int, asyncio.Future[Told | None]] = {}
        self._numbers = itertools.count(1)
        self._speed = Speed()
        self._context = zmq.Context()
        # Sending must work from synchronous code (a cancelled handler cannot await), so only receiving is async.
        self._push = self._context.socket(zmq.PUSH)
        self._pull = zmq.asyncio.Context(self._context).socket(zmq.PULL)
        for socket in (self._push, self._pull):
            socket.set_hwm(0)
            socket.linger = 0
        self._directory: Path | None = None
        if zmq.has("ipc") and len(tempfile.gettempdir()) <= LONGEST_FOLDER:
            self._directory = Path(tempfile.mkdtemp(prefix="kvarn-"))
            self._push.bind(f"ipc://{self._directory}/to")
            self._pull.bind(f"ipc://{self._directory}/from")
        else:
            self._push.bind("tcp://127.0.0.1:*")
            self._pull.bind("tcp://127.0.0.1:*")
        self.to_engine = _endpoint(self._push)
        self.from_engine = _endpoint(self._pull)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)

    @property
    def in_flight(self) -> int:
        """Sequences submitted and not finished."""
        return len(self._mailboxes)

    @property
    def waiting(self) -> int:
        """Sequences without a first token."""
        return len(self._unstarted)

    def submit(self, message: Submit, mailbox: Mailbox) -> None:
        self._mailboxes[message.id] = mailbox
        self._unstarted.add(message.id)
        self._send(message)

    def cancel(self, id: str) -> None:
        """Forget a request and tell the engine to. Unknown ids (already finished) are fine."""
        if self._mailboxes.pop(id, None) is not None:
            self._unstarted.discard(id)
            self._send(Cancel(id))

    def acknowledge(self, id: str, tokens: int, fastest: float) -> None:
        """Tell how far a request's reader is; nothing happens for one that has finished."""
        if id in self._mailboxes:
            self._send(Acknowledge(id, tokens, fastest))

    @property
    def tokens_per_second(self) -> float:
        """Output tokens that the engine lately made."""
        return self._speed.rate(time.monotonic())

    async def report_streams(self, limit: int) -> StreamsReport | None:
        """What the engine says of its `limit` most urgent streams; None when it ends before it answers."""
        question: asyncio.Future[StreamsReport | None] = asyncio.get_running_loop().create_future()
        self._questions.append(question)
        self._send(Watch(limit))
        return await question

    async def report_agents(self, limit: int) -> AgentsReport | None:
        """As that, of the `limit` programs of agents that were seen last."""
        question: asyncio.Future[AgentsReport | None] = asyncio.get_running_loop().create_future()
        self._questions.append(question)
        self._send(WatchAgents(limit))
        return await question

    async def report_rounds(self, limit: int) -> RoundsReport | None:
        """As that, of the last `limit` rounds."""
        question: asyncio.Future[RoundsReport | None] = asyncio.get_running_loop().create_future()
        self._questions.append(question)
        self._send(WatchRounds(limit))
        return await question

    def note_report(self, report: StreamsReport | AgentsReport | RoundsReport) -> None:
        """Hand a report to who asked first."""
        self._note_stats(report.stats)
        question = self._questions.popleft()
        if not question.done():  # nor did they leave meanwhile
            question.set_result(report)

    async def tell(self, event: AgentEvent) -> Told | None:
        """What the engine says to an event; None when it ends before it answers."""
        number = next(self._numbers)
        answer: asyncio.Future[Told | None] = asyncio.get_running_loop().create_future()
        self._told[number] = answer
        try:
            self._send(Tell(number, event))
            return await answer
        finally:
            self._told.pop(number, None)

    def mention(self, event: AgentEvent) -> None:
        """Tell an event without waiting for what the engine says to it."""
        self._send(Tell(0, event))

    def note_told(self, told: Told) -> None:
        """Hand an answer to who asked, if they have not left meanwhile."""
        answer = self._told.get(told.number)
        if answer is not None and not answer.done():
            answer.set_result(told)

    def shut_down(self) -> None:
        self._send(Shutdown())

    def _send(self, message: ToEngine) -> None:
        # With no peer the send would block. The engine is gone then, and its requests fail through `fail_all`.
        with contextlib.suppress(zmq.Again):
            self._push.send(self._encoder.encode(message), zmq.DONTWAIT)

    async def receive(self) -> FromEngine:
        return self._decoder.decode(await self._pull.recv())

    def deliver(self, step: StepOutputs) -> None:
        """Drop one step's outputs into the mailboxes they belong to; news of cancelled requests is dropped."""
        if step.stats is not None:
            self._note_stats(step.stats)
        for output in step.outputs:
            mailbox = self._mailboxes.get(output.id)
            if mailbox is None:
                continue
            self._unstarted.discard(output.id)
            if output.finish_reason is not None:
                del self._mailboxes[output.id]
            mailbox.put(output)

    def _note_stats(self, stats: EngineStats) -> None:
        self.stats = stats
        self._speed.note(time.monotonic(), stats.output_tokens)

    def fail_all(self, error: BaseException) -> None:
        failed = set(self._mailboxes.values())
        self._mailboxes.clear()
        self._unstarted.clear()
        for mailbox in failed:
            mailbox.fail(error)
        unanswered: list[asyncio.Future[Any]] = [*self._questions, *self._told.values()]
        for question in unanswered:
            if not question.done():
                question.set_result(None)
        self._questions.clear()

    def close(self) -> None:
        self._push.close()
        self._pull.close()
        self._context.term()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def _endpoint(socket: zmq.Socket[bytes] | zmq.asyncio.Socket) -> str:
    endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return endpoint.rstrip(b"\0").decode()
