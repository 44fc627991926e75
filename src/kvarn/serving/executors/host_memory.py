"""Host memory of the KV pool: in huge pages where it can be, and brought in before it is first needed.

Attention reads a few KiB here and there, and with small pages spends much of its time finding out where they are. The
system gives a page when it is first touched, which takes a millisecond for a huge one: as long as a tenth of a decode
step. So a thread that only gets what processors have to spare touches the pool's first part from the start on.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import threading

import torch

_MADV_POPULATE_WRITE = 23
"""Linux 5.14: bring pages in without changing them. Older kernels refuse, and pages come when they are touched."""
_LOWEST_PRIORITY = 19
_AHEAD_BYTES = 2**30
"""What is brought in at start; a pool larger than that is rarely filled, and its memory is left to others till then."""
_SLICE_BYTES = 2**24


def host_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that is zero until written. OSError when there is no memory for it."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    threading.Thread(target=_bring_in, args=(memory, min(size, _AHEAD_BYTES)), name="kv-memory", daemon=True).start()
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def _bring_in(memory: mmap.mmap, size: int) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)  # on Linux: of this thread
    # Not memory.madvise, which would keep Python's lock for as long as it takes.
    madvise = ctypes.CDLL(None).madvise
    anchor = ctypes.c_char.from_buffer(memory)  # keeps the mapping
    for start in range(0, size, _SLICE_BYTES):
        address = ctypes.c_void_p(ctypes.addressof(anchor) + start)
        if madvise(address, ctypes.c_size_t(min(_SLICE_BYTES, size - start)), _MADV_POPULATE_WRITE) != 0:
            return
