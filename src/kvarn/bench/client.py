"""The load generator: a workload in, one `RequestRecord` a request out, against any OpenAI-compatible server.

Requests leave at their arrival times whatever the server does (open loop), so a slow server cannot slow down
the questions it is asked; a concurrency cap makes it a closed loop, and latency then counts from the moment a
request was let through. Every answer is streamed; a token's time is when its event reached this process.
Nothing that goes wrong with one request stops the others: it becomes that record's `error`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvarn.bench import http
from kvarn.bench.prompts import PromptMaker
from kvarn.errors import KvarnError
from kvarn.simulation.report import RequestRecord
from kvarn.simulation.workloads import RequestSpec

_BODIES_AHEAD = 1024
"""Request bodies made before the clock starts; later ones are made while waiting for their arrival."""
_REASON_CHARS = 120
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError)
"""What reading an answer raises that is no JSON, or JSON of another shape."""


@dataclass(frozen=True)
class LoadSettings:
    """How to ask. Durations in seconds."""

    endpoint: http.Endpoint
    model: str
    chat: bool = False
    """Ask /chat/completions instead of /completions; prompts are then text."""
    text_prompts: bool = False
    """Send text instead of token ids to /completions."""
    ignore_eos: bool = True
    """Ask for outputs of exactly the wanted length; servers that reject the field need False."""
    concurrency: int | None = None
    """At most so many requests in flight; None lets all go at their arrival."""
    timeout: float = 600.0
    """For one request, from sending to the last byte."""
    stream_rate: float | None = None
    """Tokens a second of readers the workload says nothing of: told to the server, which may schedule by it."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields of every request's JSON; they win over those written here."""


@dataclass
class _Stream:
    """What has been read of one answer so far."""

    events: list[tuple[float, bool]] = field(default_factory=list)
    """(seconds, carries text) of every event of the choice."""
    output_tokens: int | None = None
    prompt_tokens: int | None = None
    finished: bool = False

    def token_times(self) -> tuple[float, ...]:
        """One time per output token.

        Servers mostly send one event a token. Where they hold text back (half a character) or join tokens, the
        usage they report says how many there were, and the tokens are laid evenly over the events, first on
        first and last on last.
        """
        with_text = [moment for moment, has_text in self.events if has_text]
        if self.output_tokens is None:
            return tuple(with_text)
        moments = [moment for moment, _ in self.events]
        chosen = moments if len(moments) <= self.output_tokens or not with_text else with_text
        if not chosen or self.output_tokens < 1:
            return ()
        places = np.rint(np.linspace(0, len(chosen) - 1, self.output_tokens)).astype(int)
        return tuple(chosen[place] for place in places)


async def run_load(
    settings: LoadSettings,
    specs: Sequence[RequestSpec],
    prompts: PromptMaker,
    *,
    on_done: Callable[[RequestRecord], None] = lambda record: None,
) -> list[RequestRecord]:
    """Send every request at its time and wait for all answers. Records come in the order of `specs`, on one clock."""
    gate = asyncio.Semaphore(settings.concurrency) if settings.concurrency else None
    ahead = {index: _body(settings, spec, prompts, index) for index, spec in enumerate(specs[:_BODIES_AHEAD])}
    start = time.perf_counter()

    async def one(spec: RequestSpec, body: bytes) -> RequestRecord:
        if gate is None:
            record = await _ask(settings, spec, body, start + spec.arrival)
        else:
            async with gate:
                record = await _ask(settings, spec, body, time.perf_counter())
        on_done(record)
        return record

    tasks = []
    async with asyncio.TaskGroup() as group:
        for index, spec in enumerate(specs):
            body = ahead.pop(index, None) or _body(settings, spec, prompts, index)
            await asyncio.sleep(max(0.0, start + spec.arrival - time.perf_counter()))
            tasks.append(group.create_task(one(spec, body)))
    return [task.result() for task in tasks]


async def warm_up(settings: LoadSettings, spec: RequestSpec, prompts: PromptMaker, count: int) -> None:
    """Send `count` requests like `spec`, one after another; KvarnError with the reason when one fails."""
    for index in range(count):
        body = _body(settings, spec, prompts, -1 - index & 0x7FFFFFFF)  # content no measured request has
        record = await _ask(settings, spec, body, time.perf_counter())
        if not record.ok:
            raise KvarnError(f"the server does not answer: {record.error}")


async def first_model(endpoint: http.Endpoint, timeout: float = 30.0) -> str:
    """The id of the first model the server lists; KvarnError when it lists none or does not answer."""
    try:
        async with asyncio.timeout(timeout):
            answer = await http.get(endpoint, "/models")
            try:
                body = await answer.body()
            finally:
                answer.close()
        if answer.status != 200:
            raise http.TransferFailed(http_reason(answer.status, body))
        return str(json.loads(body)["data"][0]["id"])
    except (LookupError, TypeError, ValueError) as error:
        raise KvarnError("the server lists no model; name one with --model") from error
    except (http.TransferFailed, OSError, EOFError) as error:
        place = f"{endpoint.host}:{endpoint.port}"
        raise KvarnError(f"no OpenAI server answers at {place}: {failure_reason(error)}; is it running?") from error


def _body(settings: LoadSettings, spec: RequestSpec, prompts: PromptMaker, index: int) -> bytes:
    body: dict[str, Any] = {
        "model": settings.model,
        "max_tokens": spec.output_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.chat:
        body["messages"] = [{"role": "user", "content": prompts.text(spec, index)}]
    else:
        body["prompt"] = prompts.text(spec, index) if settings.text_prompts else prompts.token_ids(spec, index)
    if settings.ignore_eos:
        body["ignore_eos"] = True
    return json.dumps(body | settings.extra_body).encode()


async def _ask(settings: LoadSettings, spec: RequestSpec, body: bytes, arrival: float) -> RequestRecord:
    stream = _Stream()
    error = None
    try:
        async with asyncio.timeout(settings.timeout):
            # A header, since a server that knows no readers may refuse an unknown field.
            rate = spec.declared_rate or spec.stream_rate or settings.stream_rate
            headers = () if rate is None else (("X-Stream-Rate", f"{rate:g}"),)
            path = "/chat/completions" if settings.chat else "/completions"
            answer = await http.post(settings.endpoint, path, body, headers)
            try:
                await _read(answer, stream)
            finally:
                answer.close()
    except TimeoutError:
        error = f"timeout after {settings.timeout:g} s"
    except (http.TransferFailed, OSError, EOFError, asyncio.LimitOverrunError, *UNREADABLE) as failure:
        error = failure_reason(failure)
    times = stream.token_times()
    if error is None and not times:
        error = "no tokens"
    return RequestRecord(arrival, stream.prompt_tokens or spec.prompt_tokens, times, spec.stream_rate, error)


async def _read(answer: http.Answer, stream: _Stream) -> None:
    """Read events into `stream` until the answer ends; TransferFailed when it is an error or stops half-way."""
    if answer.status != 200:
        raise http.TransferFailed(http_reason(answer.status, await answer.body()))
    async for line in answer.lines():
        now = time.perf_counter()
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            stream.finished = True
            break
        _take(stream, json.loads(data), now)
    if not stream.finished:
        raise http.TransferFailed("disconnected mid-stream")


def _take(stream: _Stream, event: dict[str, Any], now: float) -> None:
    if error := event.get("error"):
        raise http.TransferFailed(f"error mid-stream: {_message(error)}")
    if usage := event.get("usage"):
        stream.output_tokens = usage.get("completion_tokens")
        stream.prompt_tokens = usage.get("prompt_tokens")
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls")
        announces = not text and "role" in delta and not choice.get("finish_reason")
        if not announces:  # the opening event of a chat says only who speaks
            stream.events.append((now, bool(text)))
        stream.finished |= bool(choice.get("finish_reason"))


def failure_reason(failure: Exception) -> str:
    if isinstance(failure, http.TransferFailed):
        return str(failure)
    if isinstance(failure, OSError | EOFError):
        return "disconnected"
    return f"unreadable answer: {failure}"[:_REASON_CHARS]


def http_reason(status: int, body: bytes) -> str:
    try:
        message = _message(json.loads(body)["error"])
    except (ValueError, LookupError, TypeError):
        message = body.decode(errors="replace").strip()[:_REASON_CHARS]
    return f"HTTP {status}: {message}" if message else f"HTTP {status}"


def _message(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)[:_REASON_CHARS]
