"""Server-sent events: a response that streams a generation's events and ends it however the reading ends.

The first event is awaited before the status line goes out, so a request that fails early gets a proper HTTP
error; a later failure becomes an error event, after which the stream closes.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Final

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvarn.serving.api.errors import ClientGone, ErrorAnswer, explain
from kvarn.serving.api.generation import Generation, Usage
from kvarn.serving.api.service import abort_when_gone

_log = logging.getLogger(__name__)

_json = msgspec.json.Encoder()
DONE: Final = b"data: [DONE]\n\n"


def chunk_template(base: dict[str, Any], choice: bytes, *, include_usage: bool) -> bytes:
    """A %-template of one chunk: `base` and one `choice`, itself a template.

    Every token of every stream is written by such a template: models and pydantic would cost ten times as much.
    """
    head = b"data: " + _json.encode(base)[:-1].replace(b"%", b"%%")
    return head + b',"choices":[' + choice + b"]" + (b',"usage":null}\n\n' if include_usage else b"}\n\n")


def last_chunk(base: dict[str, Any], usage: Usage | None) -> bytes:
    """The end of a stream of chunks, after one with the usage if there is any to tell."""
    if usage is None:
        return DONE
    return b"data: " + _json.encode(base | {"choices": [], "usage": usage.to_json()}) + b"\n\n" + DONE


def plain_error(answer: ErrorAnswer) -> bytes:
    """The error event of chat and plain completions."""
    return b"data: " + answer.encoded() + b"\n\n"


class EventStream(Response):
    """Sends what `events` yields; each item is one or more whole events."""

    media_type = "text/event-stream"

    def __init__(
        self,
        generation: Generation,
        events: AsyncGenerator[bytes, None],
        error_event: Callable[[ErrorAnswer], bytes] = plain_error,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"} | generation.ask.hints.headers())
        self._generation = generation
        self._events = events
        self._error_event = error_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with abort_when_gone(receive, self._generation), aclosing(self._events):
            with self._generation:
                first = await anext(self._events)
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                last = b""
                try:
                    await send({"type": "http.response.body", "body": first, "more_body": True})
                    async for events in self._events:
                        await send({"type": "http.response.body", "body": events, "more_body": True})
                except Exception as error:
                    self._generation.close(error)
                    last = self._describe(error)
            # Sent once the generation is closed: who has read the end can rely on everything being released.
            await send({"type": "http.response.body", "body": last, "more_body": False})

    def _describe(self, error: Exception) -> bytes:
        if isinstance(error, ClientGone):
            return b""
        answer = explain(error)
        if answer.status == 500:
            _log.error("a stream broke", exc_info=error)
        return self._error_event(answer)
