"""Copies KV blocks between the pool and host memory of a CPU executor, in a thread beside the compute.

One slab holds all slots. Blocks are contiguous in both places, so a copy is one memory move a block, for which Python's
lock is released. Jobs run in the order they come: on one memory bus two at once would only take turns.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from time import perf_counter

import torch

from kvarn.errors import CapacityError
from kvarn.models.spec import KVMemory
from kvarn.serving.executors.host_memory import host_pages
from kvarn.serving.kvcache.copies import CopyJob, Direction


class HostCopier:
    """See kvarn.serving.kvcache.copies.Copier. `kv` on the CPU; `num_slots` slots of its block's size."""

    def __init__(self, kv: KVMemory, num_slots: int) -> None:
        """CapacityError when the slab cannot be had."""
        self._kv = kv
        self._block_bytes = kv.pages[0].nbytes
        try:
            self._slab = host_pages((num_slots, self._block_bytes), torch.uint8)
        except (RuntimeError, MemoryError, OSError) as error:
            wanted = num_slots * self._block_bytes / 2**20
            raise CapacityError(
                f"cannot allocate {wanted:.0f} MiB for KV on the host: lower --host-memory ({error})"
            ) from error
        self._jobs: queue.SimpleQueue[CopyJob | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[CopyJob] = queue.SimpleQueue()
        self._news = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-copies", daemon=True)
        self._thread.start()

    def start(self, job: CopyJob) -> None:
        self._jobs.put(job)

    def finished(self) -> list[CopyJob]:
        self._news.clear()
        ended = []
        while not self._ended.empty():
            job = self._ended.get()
            if job.direction is Direction.TO_DEVICE and job.error is None:
                self._kv.place(job.blocks, job.starts)
            ended.append(job)
        return ended

    def wait(self, seconds: float) -> None:
        if self._ended.empty():
            self._news.wait(seconds)

    def slot(self, index: int) -> memoryview:
        """The bytes of a slot."""
        return self._slab[index].numpy().data

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            started = perf_counter()
            try:
                self._copy(job)
            except Exception as error:  # its thread must live: others wait for their copies
                job.error = f"{type(error).__name__}: {error}"
            job.seconds = perf_counter() - started
            self._ended.put(job)
            self._news.set()

    def _copy(self, job: CopyJob) -> None:
        size, pages, slab = self._block_bytes, self._kv.pages.data_ptr(), self._slab.data_ptr()
        for block, slot in zip(job.blocks, job.slots, strict=True):
            device, host = pages + block * size, slab + slot * size
            to, source = (host, device) if job.direction is Direction.TO_HOST else (device, host)
            ctypes.memmove(to, source, size)
