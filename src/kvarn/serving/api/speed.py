"""How fast a total lately grew, from a few readings of it a second."""

from __future__ import annotations

from collections import deque

WINDOW = 2.0
"""Seconds that count."""


class Speed:
    """Readings of one total in order of time."""

    def __init__(self) -> None:
        self._readings: deque[tuple[float, int]] = deque([(float("-inf"), 0)])

    def note(self, now: float, total: int) -> None:
        """The total is so much at `now`, in seconds."""
        self._readings.append((now, total))
        self._forget(now)

    def rate(self, now: float) -> float:
        """By how much a second it grew over about the last WINDOW seconds, or since the first reading."""
        self._forget(now)
        (began, before), (_, latest) = self._readings[0], self._readings[-1]
        return (latest - before) / (now - began) if now > began else 0.0

    def _forget(self, now: float) -> None:
        while len(self._readings) > 1 and self._readings[1][0] <= now - WINDOW:
            self._readings.popleft()
