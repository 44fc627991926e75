"""The shared library of native CPU kernels: finding it, loading it, choosing its instruction set.

`KVARN_KERNELS` in the environment says what to run: `native` (the default: the best instruction set the processor
has), one of their names in `CHOICES`, or `reference` for no native kernels at all.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from pathlib import Path

CHOICES = ("native", "avx512_bf16", "avx512_vnni", "avx512", "avx2", "portable", "reference")
"""What KVARN_KERNELS may be; a processor may lack the instructions of some."""

_LIBRARY_PATH = Path(__file__).with_name("_cpu.so")
_BUILD_HINT = "install g++ and torch, then run `pip install --no-build-isolation kvarn` (from a checkout: `make setup`)"


class NativeKernels:
    """The loaded library. Loading registers its CPU implementations of the `kvarn::` operators with torch."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.kvarn_kernels_variant.restype = ctypes.c_char_p
        self._variants = self._read_variants()
        self.selected = self._variants[0]

    def _read_variants(self) -> tuple[str, ...]:
        names: list[str] = []
        while (name := self._library.kvarn_kernels_variant(len(names))) is not None:
            names.append(name.decode())
        return tuple(names)

    @property
    def variants(self) -> tuple[str, ...]:
        """Instruction sets this processor can run, best first."""
        return self._variants

    def select(self, variant: str) -> None:
        """Run `variant` from the next call on, in all threads. ValueError when the processor cannot."""
        if variant not in self._variants:
            raise ValueError(f"kernels {variant!r} do not run on this processor; it runs {', '.join(self._variants)}")
        self._library.kvarn_kernels_select(self._variants.index(variant))
        self.selected = variant


def load() -> NativeKernels | None:
    """What `KVARN_KERNELS` asks for, or None for the reference. Warns when the library is wanted but not there."""
    wanted = os.environ.get("KVARN_KERNELS", "native")
    if wanted == "reference":
        return None
    try:
        kernels = NativeKernels(_LIBRARY_PATH)
    except OSError as error:
        reason = "they were not built" if not _LIBRARY_PATH.exists() else f"they do not load ({error})"
        warnings.warn(
            f"kvarn runs without its native CPU kernels because {reason}: the reference kernels are many times "
            f"slower. To get them, {_BUILD_HINT}; KVARN_KERNELS=reference silences this.",
            stacklevel=2,
        )
        return None
    if wanted != "native":
        try:
            kernels.select(wanted)
        except ValueError as error:
            raise ValueError(f"KVARN_KERNELS={wanted}: {error}; or `native`, `reference`") from None
    return kernels
