"""What the engine says to people who watch it: those who ask at the same time share one answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from starlette.requests import Request

from kvarn.errors import RequestError
from kvarn.serving.api.engine_client import EngineLink
from kvarn.serving.api.service import answered

FRESH = 0.2
"""Seconds that a report is told again: whatever the number of watchers, the engine is asked five times a second."""

Report = TypeVar("Report")


class Watching(Generic[Report]):
    """Reports of one kind, each of as many things as `limit` says at most."""

    def __init__(self, ask: Callable[[EngineLink, int], Coroutine[Any, Any, Report | None]]) -> None:
        self._ask = ask
        self._asking: asyncio.Task[Report | None] | None = None
        self._asked: tuple[EngineLink, int] | None = None
        self._fresh_until = 0.0

    async def report(self, link: EngineLink, limit: int) -> Report:
        """The answer to the latest question if it will do, else to a new one. Raises Unavailable."""
        asking, now = self._asking, time.monotonic()
        will_do = self._asked is not None and self._asked[0] is link and self._asked[1] >= limit
        if asking is None or not will_do or (asking.done() and now > self._fresh_until):
            asking = self._asking = asyncio.create_task(self._ask(link, limit))
            self._asked, self._fresh_until = (link, limit), now + FRESH
        return await answered(asyncio.shield(asking))


def limit_query(what: str, default: int, most: int) -> dict[str, Any]:
    """The description of the query parameter that `limit_of` reads."""
    schema = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    return {"parameters": [{"name": "limit", "in": "query", "description": what, "schema": schema}]}


def limit_of(request: Request, default: int, most: int) -> int:
    """How many things a watcher wants to be told of. Raises RequestError."""
    text = request.query_params.get("limit", str(default))
    limit = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if not 1 <= limit <= most:
        raise RequestError(f"limit is {text[:40]!r}; expected a whole number, 1 to {most}", field="limit")
    return limit
