"""Copies KV blocks between a CUDA device and page-locked host memory, beside the compute.

One stream each way, so that the link carries both directions at once. A copy begins after all that the compute stream
had been given when it was started: what it reads has been written by then, and what it overwrites nobody reads any
more. It ends with an event, which `finished` polls; only then are its blocks used again, so no other stream waits for
it. A block is contiguous in both places: one copy each.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from time import sleep
from typing import Final

import torch

from kvarn.models.spec import KVMemory
from kvarn.serving.kvcache.copies import CopyJob, Direction

_CHUNK_BYTES: Final = 2**28
"""Page-locked at a time: locking takes about a second a few GiB, too long for start-up and for one step."""
_POLL_SECONDS: Final = 2e-4


@dataclass(slots=True)
class _Copy:
    job: CopyJob
    started: torch.cuda.Event
    ended: torch.cuda.Event

    @property
    def is_over(self) -> bool:
        return bool(self.ended.query())  # type: ignore[no-untyped-call]


class DeviceCopier:
    """See kvarn.serving.kvcache.copies.Copier. `kv` on a CUDA device; `num_slots` slots of its block's size."""

    def __init__(self, kv: KVMemory, num_slots: int) -> None:
        self._kv = kv
        self._slab = PinnedSlab(num_slots, kv.pages[0].nbytes)
        self._blocks = kv.pages.view(kv.pages.shape[0], -1).view(torch.uint8)
        self._streams = {direction: torch.cuda.Stream(kv.pages.device) for direction in Direction}  # type: ignore[no-untyped-call]
        self._copies: dict[Direction, deque[_Copy]] = {direction: deque() for direction in Direction}
        self._failed: list[CopyJob] = []

    def start(self, job: CopyJob) -> None:
        """Launch the copies of a job. One for which no host memory can be locked fails."""
        try:
            slots = [self._slab.row(slot) for slot in job.slots]
        except RuntimeError as error:
            job.error = f"cannot lock host memory: {error}"
            self._failed.append(job)
            return
        stream = self._streams[job.direction]
        stream.wait_stream(torch.cuda.current_stream(self._kv.pages.device))
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        started.record(stream)
        with torch.cuda.stream(stream):
            for block, slot in zip(job.blocks, slots, strict=True):
                if job.direction is Direction.TO_HOST:
                    slot.copy_(self._blocks[block], non_blocking=True)
                else:
                    self._blocks[block].copy_(slot, non_blocking=True)
        ended.record(stream)
        self._copies[job.direction].append(_Copy(job, started, ended))

    def finished(self) -> list[CopyJob]:
        ended, self._failed = self._failed, []
        for direction, copies in self._copies.items():
            while copies and copies[0].is_over:
                copy = copies.popleft()
                copy.job.seconds = copy.started.elapsed_time(copy.ended) / 1e3
                if direction is Direction.TO_DEVICE:
                    self._kv.place(copy.job.blocks, copy.job.starts)  # on the compute stream, which reads them next
                ended.append(copy.job)
        return ended

    def wait(self, seconds: float) -> None:
        waited = 0.0
        while waited < seconds and not self._failed and any(self._copies.values()):
            if any(copies and copies[0].is_over for copies in self._copies.values()):
                return
            sleep(_POLL_SECONDS)
            waited += _POLL_SECONDS

    def slot(self, index: int) -> memoryview:
        """The bytes of a slot."""
        return self._slab.row(index).numpy().data

    def close(self) -> None:
        for stream in self._streams.values():
            stream.synchronize()


class PinnedSlab:
    """Rows of page-locked memory, taken from the system when they are first asked for."""

    def __init__(self, num_rows: int, row_bytes: int, *, chunk_bytes: int = _CHUNK_BYTES, pinned: bool = True) -> None:
        self._row_bytes = row_bytes
        self._num_rows = num_rows
        self._rows_in_chunk = max(1, chunk_bytes // row_bytes)
        self._pinned = pinned
        self._chunks: dict[int, torch.Tensor] = {}

    def row(self, index: int) -> torch.Tensor:
        """[row_bytes] uint8. RuntimeError when the system has no such memory."""
        number, place = divmod(index, self._rows_in_chunk)
        chunk = self._chunks.get(number)
        if chunk is None:
            rows = min(self._rows_in_chunk, self._num_rows - number * self._rows_in_chunk)
            chunk = torch.empty((rows, self._row_bytes), dtype=torch.uint8, pin_memory=self._pinned)
            self._chunks[number] = chunk
        return chunk[place]
