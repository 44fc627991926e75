"""What every endpoint needs, in one place: the engine, the model's text side, limits, metrics, the recorder.

An endpoint goes the same way each time: `tenant`, read the body, `engine`, make tokens, `output_limit`,
`generate`, read the generation.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.requests import Request
from starlette.types import Receive

from kvarn.errors import RequestError
from kvarn.serving.api.auth import ApiKeys
from kvarn.serving.api.calls import CallBook
from kvarn.serving.api.config import ServerConfig
from kvarn.serving.api.engine_client import EngineLink
from kvarn.serving.api.errors import ClientGone, Unavailable
from kvarn.serving.api.generation import Ask, Generation
from kvarn.serving.api.hint_schemas import HintFields
from kvarn.serving.api.hints import Hints, read_hints
from kvarn.serving.api.limits import Admission
from kvarn.serving.api.messages import Ready
from kvarn.serving.api.metrics import Metrics
from kvarn.serving.api.recorder import FinishedSequence, Recorder
from kvarn.serving.api.supervisor import EngineSupervisor
from kvarn.serving.api.text import ModelText
from kvarn.serving.reader import FASTEST, SLOWEST

Answer = TypeVar("Answer")

PATIENCE = 10.0
"""Seconds that the engine may take to answer: it does between steps, and long prompts make long ones."""


class Service:
    """One served model. Lives in the event loop's thread."""

    def __init__(
        self,
        config: ServerConfig,
        text: ModelText,
        supervisor: EngineSupervisor,
        metrics: Metrics,
        recorder: Recorder | None,
    ) -> None:
        self.config = config
        self.text = text
        self.supervisor = supervisor
        self.metrics = metrics
        self.created = int(time.time())
        self.draining = False
        self._recorder = recorder
        self._keys = ApiKeys(config.api_keys, config.stream_rate_limits)
        self.calls = CallBook()
        self._admission = Admission(config)
        self._generations: dict[str, Generation] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def model_name(self) -> str:
        return self.config.model_name

    def tenant(self, request: Request) -> str:
        """Whose request this is. Raises RequestError (401)."""
        return self._keys.tenant(request.headers.get("authorization"))

    def stream_rate(self, request: Request, asked: float | None, tenant: str) -> float:
        """Tokens a second that a request's reader takes, as far as he is believed. Raises RequestError."""
        if asked is None and (header := request.headers.get("x-stream-rate")) is not None:
            try:
                asked = float(header)
            except ValueError:
                asked = float("nan")
            if not SLOWEST <= asked <= FASTEST:
                raise RequestError(
                    f"the header X-Stream-Rate is {header[:40]!r}; expected tokens per second, "
                    f"{SLOWEST:g} to {FASTEST:.0f}",
                    field="stream_rate",
                )
        rate = self.config.default_stream_rate if asked is None else asked
        return min(rate, self.fastest_reader(tenant))

    def fastest_reader(self, tenant: str) -> float:
        """Tokens a second that a tenant's readers are believed to take at most."""
        return self._keys.fastest(tenant, self.config.max_stream_rate)

    def hints(self, request: Request, body: HintFields) -> Hints:
        """What a request says of the agent behind it, and what to answer to that."""
        return read_hints(body.hint_fields, request.headers, self.config.engine.policy)

    def note_calls(self, generation: Generation, calls: Mapping[str, str]) -> None:
        """An answer has ended with calls (id -> tool): tell the engine, and know their results when they come."""
        if generation.ask.is_single:
            request = generation.note_calls(list(calls.values()))
            self.calls.note_calls(generation.ask.tenant, calls, request)

    def find(self, id: str, tenant: str) -> Generation:
        """A running generation of this tenant. Raises RequestError (404)."""
        generation = self._generations.get(id)
        if generation is None or generation.ask.tenant != tenant:
            raise RequestError(f"no answer {id[:80]!r} is being made here", code="not_found", status=404)
        return generation

    def check_model(self, name: str | None) -> None:
        """Raise RequestError (404) unless `name` is the served model; no name means that one."""
        if name is not None and name != self.model_name:
            raise RequestError(
                f"there is no model {name[:200]!r} here; this server has {self.model_name!r}",
                field="model",
                code="model_not_found",
                status=404,
            )

    async def engine(self) -> tuple[EngineLink, Ready]:
        """A ready engine, waited for if one is starting. Raises Unavailable."""
        if self.draining:
            raise Unavailable("the server is shutting down; send the request again to its successor", retry_after=5)
        link = await self.supervisor.wait_ready()
        assert link.ready is not None
        return link, link.ready

    def running_engine(self) -> EngineLink:
        """The engine, for questions that are worth nothing to its successor. Raises Unavailable."""
        link = self.supervisor.link
        if link is None or link.ready is None:
            raise Unavailable("the engine is not running; it is being started", retry_after=2)
        return link

    def generate(self, id: str, ask: Ask, link: EngineLink, arrival: float, *, streams: bool = False) -> Generation:
        """Admit and start; `arrival` is on `time.monotonic`. Raises RequestError, Overloaded or Unavailable.

        What `streams` is sent as it is read where the server paces.
        """
        assert link.ready is not None
        ask.params.validate(link.ready.vocab_size)
        for prompt in ask.prompts:
            worst = max(prompt.tokens)
            if worst >= link.ready.vocab_size:
                raise RequestError(
                    f"the prompt has token {worst}; the vocabulary is 0 to {link.ready.vocab_size - 1}",
                    field="segments" if prompt.segments else "prompt",
                )
        if self.draining:
            raise Unavailable("the server is shutting down; send the request again to its successor", retry_after=5)
        if self.supervisor.link is not link:
            raise Unavailable("the engine is restarting; send the request again", retry_after=1)
        self._admission.admit(link, len(ask.prompts) * ask.n, time.monotonic())
        generation = Generation(
            id,
            ask,
            link,
            self.metrics,
            self.text.decoder,
            self._note_finished,
            self._forget,
            arrival=arrival,
            timeout=self.config.request_timeout,
            pace=self.config.pace and streams,
        )
        self._generations[id] = generation
        if not ask.is_single:
            self.calls.note_plural(ask.tenant, id)
        self._idle.clear()
        return generation

    def _note_finished(self, sequence: FinishedSequence) -> None:
        self._admission.note_finished(time.monotonic())
        if self._recorder is not None:
            self._recorder.record(sequence)

    def _forget(self, generation: Generation) -> None:
        self._generations.pop(generation.id, None)
        if not self._generations:
            self._idle.set()

    async def drain(self) -> None:
        """Admit nothing more; return when nothing runs, at the latest after `drain_seconds`, the rest cancelled."""
        self.draining = True
        try:
            async with asyncio.timeout(self.config.drain_seconds):
                await self._idle.wait()
        except TimeoutError:
            self.abort_all()

    def abort_all(self) -> None:
        for generation in list(self._generations.values()):
            generation.abort(Unavailable("the server is shutting down; send the request again", retry_after=5))


async def answered(question: Awaitable[Answer | None]) -> Answer:
    """What the engine answers to a question, which takes until its step ends. Raises Unavailable."""
    try:
        async with asyncio.timeout(PATIENCE):
            answer = await question
    except TimeoutError:
        raise Unavailable("the engine is in a long step; ask again soon", retry_after=2) from None
    if answer is None:
        raise Unavailable("the engine ended before it answered; it is being started", retry_after=2)
    return answer


def output_limit(
    longest_prompt: int, asked: int | None, default: int, context: int, *, field: str, prompt_field: str
) -> int:
    """Output tokens to allow after a prompt of so many. Raises RequestError (context_length_exceeded)."""
    room = context - longest_prompt
    if room < 1:
        raise RequestError(
            f"the prompt has {longest_prompt} tokens; the context is {context} tokens of prompt and output together",
            field=prompt_field,
            code="context_length_exceeded",
        )
    if asked is not None and asked > room:
        raise RequestError(
            f"the prompt has {longest_prompt} tokens and {field} is {asked}, together {longest_prompt + asked}; "
            f"the context is {context} tokens: shorten the prompt or ask for at most {room}",
            field=field,
            code="context_length_exceeded",
        )
    return min(default, room) if asked is None else asked


@asynccontextmanager
async def abort_when_gone(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """While inside, a closed connection aborts the generation at once, also when nothing is being sent."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.abort(ClientGone("the client closed the connection"))

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
