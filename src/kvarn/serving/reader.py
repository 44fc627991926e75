"""The reader at the other end of a stream: how much he has left to read, and when he runs dry. Pure; times come in.

A reader takes one token every 1/r seconds and never reads a token before it exists:

    play_1 = t_1,   play_j = max(t_j, play_(j-1) + 1/r)

What he has not read yet is his *buffer*; the seconds until he would wait are his *slack*. Both follow from when the
latest token will be read, so a token costs a few additions whatever the length of the stream. `kvarn.simulation.report`
computes the same from recorded times.

Source: TokenFlow (arXiv 2510.02758), section 3: its buffer, with playback that shifts when a token comes late.
"""

from __future__ import annotations

from math import ceil

DEFAULT_RATE = 20.0
"""Tokens a second: faster than people read aloud, about as fast as they skim."""
SLOWEST, FASTEST = 0.1, 10_000.0
"""Rates that a reader may have, in tokens per second."""
_SHORTEST_MEASURE = 0.5
"""Seconds between two acknowledgements that tell a rate."""
_TICK = 1e-6
"""Seconds below which two times are the same: sums of a playback clock carry rounding."""


class Reader:
    """One stream's playback clock, at `rate` tokens per second."""

    __slots__ = ("_acknowledged", "_next_play", "rate", "stall_seconds", "stalls", "tokens")

    def __init__(self, rate: float = DEFAULT_RATE) -> None:
        """ValueError unless the rate is above zero."""
        if not rate > 0:
            raise ValueError(f"a reader's rate is {rate} tokens per second; it must be above 0")
        self.rate = rate
        self.tokens = 0
        """Tokens made so far."""
        self.stalls = 0
        """How often he had to wait after the first token."""
        self.stall_seconds = 0.0
        """How long he waited in all."""
        self._next_play = 0.0
        self._acknowledged: tuple[float, int] | None = None

    @property
    def started(self) -> bool:
        """Whether he has got his first token."""
        return self.tokens > 0

    def receive(self, now: float) -> None:
        """Note one more token, made at `now` (seconds, never less than before)."""
        late = now - self._next_play
        if self.tokens and late > _TICK:
            self.stalls += 1
            self.stall_seconds += late
        if late > 0 or not self.tokens:
            self._next_play = now
        self._next_play += 1.0 / self.rate
        self.tokens += 1

    def slack(self, now: float) -> float:
        """Seconds until he waits for a token that is not there; 0 before the first token and while he waits."""
        return max(0.0, self._next_play - now) if self.tokens else 0.0

    def dry_at(self) -> float:
        """When he will have read everything, in seconds on the clock of `receive`; -inf before the first token."""
        return self._next_play if self.tokens else float("-inf")

    def buffer(self, now: float) -> int:
        """Tokens made and not yet begun to be read at `now`; the one being read counts as read."""
        last_play = self._next_play - 1.0 / self.rate
        return min(self.tokens, max(0, ceil((last_play - now - _TICK) * self.rate)))

    def set_rate(self, rate: float, now: float) -> None:
        """From `now` on he reads faster or slower; what he has not read stays unread. ValueError for a rate <= 0."""
        if not rate > 0:
            raise ValueError(f"a reader's rate is {rate} tokens per second; it must be above 0")
        if self.tokens and self._next_play > now:
            self._next_play = now + (self._next_play - now) * self.rate / rate
        self.rate = rate

    def acknowledge(self, read: int, now: float, fastest: float) -> None:
        """He says how many tokens he has read by `now`: what he has left follows, and from two such words his rate.

        A rate is believed up to `fastest`, changes by half of the difference at a word, and never while he waits
        for a token: then it would be ours. Words that go back, or tell of tokens not made yet, are ignored.
        """
        if not 0 <= read <= self.tokens or (self._acknowledged is not None and read < self._acknowledged[1]):
            return
        if self._acknowledged is None:
            self._acknowledged = (now, read)
        else:
            since, before = self._acknowledged
            if now - since >= _SHORTEST_MEASURE:
                if read < self.tokens and read > before:
                    measured = (read - before) / (now - since)
                    self.rate = min(fastest, (self.rate + measured) / 2)
                self._acknowledged = (now, read)
        if self.tokens:
            self._next_play = now + (self.tokens - read) / self.rate
