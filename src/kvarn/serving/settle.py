"""What a process does once it has loaded all it needs and before it serves for days."""

from __future__ import annotations

import ctypes
import gc
import sys


def settle() -> None:
    """Take what is loaded as here to stay, and give memory that loading freed back to the system.

    The collector need not look at what stays again and again; the C library would keep the rest for later.
    """
    gc.collect()
    gc.freeze()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)
