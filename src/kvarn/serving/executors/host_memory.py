"""Host memory of the KV pool: in huge pages where it can be, and brought in before it is first needed.

Attention reads a few KiB here and there, and with small pages spends much of its time finding out where they are. The
system gives a page when it is first touched, which takes a millisecond for a huge one: as long as a tenth of a decode
step. So a thread that only gets what processors have to spare touches the pool's first part from the start on.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading

import torch

from kvarn.kernels.huge_pages import HAS_HUGE_PAGES, huge_pages

_MADV_POPULATE_WRITE = 23
"""Linux 5.14: bring pages in without changing them. Older kernels refuse, and pages come when they are touched."""
_LOWEST_PRIORITY = 19
_AHEAD_BYTES = 2**30
"""What is brought in at start; a pool larger than that is rarely filled, and its memory is left to others till then."""
_SLICE_BYTES = 2**24


def host_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that is zero until written. OSError when there is no memory for it."""
    if not HAS_HUGE_PAGES:
        return torch.zeros(shape, dtype=dtype)
    memory = huge_pages(math.prod(shape) * dtype.itemsize)
    threading.Thread(target=_bring_in, args=(memory[:_AHEAD_BYTES],), name="kv-memory", daemon=True).start()
    return memory.view(dtype).view(shape)


def _bring_in(memory: torch.Tensor) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)  # on Linux: of this thread
    madvise = ctypes.CDLL(None).madvise
    for start in range(0, len(memory), _SLICE_BYTES):  # each at a page
        part = memory[start : start + _SLICE_BYTES]
        if madvise(ctypes.c_void_p(part.data_ptr()), ctypes.c_size_t(part.nbytes), _MADV_POPULATE_WRITE) != 0:
            return
