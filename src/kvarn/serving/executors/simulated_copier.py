"""Copies KV blocks over a modelled link: a job in, and out again once the virtual clock has come so far."""

from __future__ import annotations

from collections import deque

from kvarn.hardware.links import HostLink
from kvarn.serving.clock import VirtualClock
from kvarn.serving.kvcache.copies import CopyJob, Direction


class SimulatedCopier:
    """See kvarn.serving.kvcache.copies.Copier."""

    def __init__(self, link: HostLink, clock: VirtualClock, *, block_bytes: int) -> None:
        self.link = link
        self.clock = clock
        self.block_bytes = block_bytes
        self._queues: dict[Direction, deque[tuple[float, CopyJob]]] = {direction: deque() for direction in Direction}
        """Jobs under way with the moments of their ends, ascending each way."""

    def start(self, job: CopyJob) -> None:
        way = self.link.to_host if job.direction is Direction.TO_HOST else self.link.to_device
        now, num_bytes = self.clock.now(), len(job.blocks) * self.block_bytes
        job.seconds = way.latency_seconds + num_bytes / way.bytes_per_second
        self._queues[job.direction].append((way.send(num_bytes, now), job))

    def finished(self) -> list[CopyJob]:
        now, ended = self.clock.now(), []
        for queue in self._queues.values():
            while queue and queue[0][0] <= now:
                ended.append(queue.popleft()[1])
        return ended

    def wait(self, seconds: float) -> None:
        """Set the clock forward to the next end, or by `seconds` if that is sooner."""
        now = self.clock.now()
        ends = [queue[0][0] for queue in self._queues.values() if queue]
        self.clock.advance(max(0.0, min([now + seconds, *ends]) - now))

    def close(self) -> None:
        """Set the clock forward to the end of all."""
        ends = [queue[-1][0] for queue in self._queues.values() if queue]
        self.clock.advance(max(0.0, max(ends, default=0.0) - self.clock.now()))
