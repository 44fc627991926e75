"""Links between two memories: bytes and a moment in, the moment at which they have arrived out.

A link moves one transfer at a time, first come, first served. Both ways of a duplex link run at once; of another they
take turns. Nothing here runs by itself: whoever simulates asks with times of their own clock, which never go back.
"""

from __future__ import annotations

from collections import deque

from kvarn.hardware.accelerators import Accelerator


class Link:
    """One way. `latency_seconds` pass before each transfer's first byte."""

    def __init__(self, bytes_per_second: float, latency_seconds: float = 0.0) -> None:
        if not bytes_per_second > 0:
            raise ValueError(f"bytes_per_second is {bytes_per_second}; expected a number above 0")
        if not latency_seconds >= 0:
            raise ValueError(f"latency_seconds is {latency_seconds}; expected seconds from 0 on")
        self.bytes_per_second = bytes_per_second
        self.latency_seconds = latency_seconds
        self.moved_bytes = 0
        """All that was ever queued."""
        self._queue: deque[tuple[float, float, int]] = deque()
        """(first byte, last byte, bytes) of the transfers that may not be over."""

    def send(self, num_bytes: int, now: float) -> float:
        """Queue a transfer; the moment at which its last byte arrives."""
        if num_bytes < 0:
            raise ValueError(f"num_bytes is {num_bytes}; expected 0 or more")
        begin = max(now, self.free_at) + self.latency_seconds
        end = begin + num_bytes / self.bytes_per_second
        self._forget(now)
        self._queue.append((begin, end, num_bytes))
        self.moved_bytes += num_bytes
        return end

    @property
    def free_at(self) -> float:
        """When everything queued has arrived; 0 while nothing was."""
        return self._queue[-1][1] if self._queue else 0.0

    def queued_bytes(self, now: float) -> float:
        """Bytes that have not arrived yet."""
        self._forget(now)
        return sum(
            num_bytes if now <= begin else num_bytes * (end - now) / (end - begin)
            for begin, end, num_bytes in self._queue
            if end > now
        )

    def _forget(self, now: float) -> None:
        while len(self._queue) > 1 and self._queue[0][1] <= now:  # the last one says when the link is free
            self._queue.popleft()


class HostLink:
    """An accelerator's link to its host, both ways; one that is not duplex moves both at `device_to_host`."""

    def __init__(self, accelerator: Accelerator, latency_seconds: float = 0.0) -> None:
        self.to_host = Link(accelerator.device_to_host, latency_seconds)
        self.to_device = Link(accelerator.host_to_device, latency_seconds) if accelerator.duplex else self.to_host
