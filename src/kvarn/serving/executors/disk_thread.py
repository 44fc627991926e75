"""Reads and writes KV on disk in a thread beside the compute: reads first, for a request waits for each of them."""

from __future__ import annotations

import queue
import threading
from collections import deque

from kvarn.serving.kvcache.disk import DiskJob, perform
from kvarn.serving.kvcache.disk_file import DiskFile


class DiskThread:
    """See kvarn.serving.kvcache.disk.DiskIO. Owns the file."""

    def __init__(self, file: DiskFile) -> None:
        self._file = file
        self._reads: deque[DiskJob] = deque()
        self._writes: deque[DiskJob] = deque()
        self._work = threading.Semaphore(0)
        self._closing = False
        self._ended: queue.SimpleQueue[DiskJob] = queue.SimpleQueue()
        self._news = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-disk", daemon=True)
        self._thread.start()

    def start(self, job: DiskJob) -> None:
        (self._writes if job.writes else self._reads).append(job)
        self._work.release()

    def finished(self) -> list[DiskJob]:
        self._news.clear()
        ended = []
        while not self._ended.empty():
            ended.append(self._ended.get())
        return ended

    def wait(self, seconds: float) -> None:
        if self._ended.empty():
            self._news.wait(seconds)

    def close(self) -> None:
        self._closing = True
        self._work.release()
        self._thread.join()
        self._file.close()

    def _run(self) -> None:
        while True:
            self._work.acquire()
            if self._closing:
                return
            job = (self._reads or self._writes).popleft()
            perform(self._file, job)
            self._ended.put(job)
            self._news.set()
