"""Tokens as they are read, and not as they are made: a mailbox that keeps each one until shortly before its time.

Whoever writes to a slow reader as fast as tokens come fills buffers on the way that nobody can take back: when he
leaves, what he has not read was sent in vain. Here it waits in the server, `LEAD` seconds ahead of the reader.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from kvarn.serving.api.engine_client import Mailbox
from kvarn.serving.api.messages import TokenOutput
from kvarn.serving.reader import Reader

LEAD = 1.0
"""Seconds that a token is sent before its reader gets to it: what networks may lose without him noticing."""


class PacedMailbox(Mailbox):
    """A mailbox for readers of `rate` tokens per second. A failure lets everything go at once."""

    __slots__ = ("_held", "_rate", "_readers")

    def __init__(self, rate: float) -> None:
        super().__init__()
        self._rate = rate
        self._readers: dict[str, Reader] = {}
        self._held: dict[str, deque[tuple[float, TokenOutput]]] = {}

    def put(self, output: TokenOutput) -> None:
        reader = self._readers.setdefault(output.id, Reader(self._rate))
        held = self._held.setdefault(output.id, deque())
        now = time.monotonic()
        for part in _by_token(output):
            if part.tokens:
                reader.receive(now)
            held.append((reader.dry_at() - 1.0 / reader.rate - LEAD, part))
        self._wake()

    async def get(self) -> list[TokenOutput]:
        while True:
            due = self._release()
            if self._news or self._error is not None:
                return await super().get()
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = None if due is None else loop.call_later(max(0.0, due - time.monotonic()), self._wake)
            try:
                await self._waiter
            finally:
                self._waiter = None
                if timer is not None:
                    timer.cancel()

    def _release(self) -> float | None:
        """Make news of what is due; when the next is, if there is any."""
        now, nearest = time.monotonic(), None
        for held in self._held.values():
            while held and (held[0][0] <= now or self._error is not None):
                self._news.append(held.popleft()[1])
            if held and (nearest is None or held[0][0] < nearest):
                nearest = held[0][0]
        return nearest


def _by_token(output: TokenOutput) -> list[TokenOutput]:
    """The same news with at most one token each; how it ended comes with the last."""
    parts = [
        TokenOutput(
            output.id,
            [token],
            logprobs=None if output.logprobs is None else [output.logprobs[i]],
            cached_tokens=output.cached_tokens,
        )
        for i, token in enumerate(output.tokens)
    ] or [TokenOutput(output.id, [], cached_tokens=output.cached_tokens)]
    last = parts[-1]
    last.finish_reason, last.error, last.error_field = output.finish_reason, output.error, output.error_field
    return parts
