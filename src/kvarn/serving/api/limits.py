"""Admission: how many sequences may wait or run, and when a refused client should come back."""

from __future__ import annotations

import math
from collections import deque

from kvarn.errors import RequestError
from kvarn.serving.api.config import ServerConfig
from kvarn.serving.api.engine_client import EngineLink
from kvarn.serving.api.errors import Overloaded

WINDOW_SECONDS = 30.0
LONGEST_RETRY = 60.0


class Admission:
    """Decides whether more sequences fit, and remembers how fast they have been finishing."""

    def __init__(self, config: ServerConfig) -> None:
        self._max_waiting = config.max_queued
        self._max_in_flight = config.max_concurrent
        self._finished: deque[float] = deque()

    def admit(self, link: EngineLink, sequences: int, now: float) -> None:
        """Raise Overloaded when `sequences` more would be too many now, RequestError when they always would."""
        most = min(self._max_waiting, self._max_in_flight)
        if sequences > most:
            raise RequestError(
                f"the request asks for {sequences} answers at once; this server takes {most} at most: "
                "send fewer prompts in a request, or a smaller n",
                field="n",
            )
        if link.waiting + sequences > self._max_waiting:
            over = link.waiting + sequences - self._max_waiting
            what = f"{link.waiting} are waiting for their first token"
        elif link.in_flight + sequences > self._max_in_flight:
            over = link.in_flight + sequences - self._max_in_flight
            what = f"{link.in_flight} are in flight"
        else:
            return
        raise Overloaded(f"too many requests: {what}; try again later", retry_after=self._seconds_until(over, now))

    def note_finished(self, now: float) -> None:
        self._finished.append(now)
        self._forget_before(now - WINDOW_SECONDS)

    def _seconds_until(self, count: int, now: float) -> float:
        """When `count` more sequences will have finished, going by the last half minute."""
        self._forget_before(now - WINDOW_SECONDS)
        if len(self._finished) < 2:
            return 2.0
        rate = len(self._finished) / max(now - self._finished[0], 1e-3)
        return min(math.ceil(count / rate), LONGEST_RETRY)

    def _forget_before(self, limit: float) -> None:
        while self._finished and self._finished[0] < limit:
            self._finished.popleft()
