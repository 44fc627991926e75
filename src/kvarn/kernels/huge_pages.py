"""Host memory in huge pages, where the system has them: large tensors that are read in order or here and there cost
far fewer look-ups of addresses in it."""

from __future__ import annotations

import contextlib
import mmap

import torch

HUGE_PAGE = 2**21
HAS_HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")


def huge_pages(size: int) -> torch.Tensor:
    """`size` bytes from the start of a huge page on, zero until written and not taken until touched.

    Only where the system HAS_HUGE_PAGES. OSError when there is no memory for it.
    """
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + size]
