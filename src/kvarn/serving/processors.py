"""How many processors this process may use, by its affinity mask and the quotas of its control groups; and how its
threads wait.

The host's count says nothing in a container: a pod limited to two processors of sixty-four that starts sixty-four
threads is stopped by the kernel for most of every period. Reads Linux's files, version 1 and 2 of control groups;
elsewhere, or where they cannot be read, the affinity mask or the machine's count stands alone. A cpuset needs no look:
the kernel narrows the affinity mask by it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_SPIN_COUNT = "2000"
"""Turns (about 20 us) that a compute thread waits for its peers before it sleeps. OpenMP's default is milliseconds:
no faster here, and ten times slower as soon as another process wants the core."""


def wait_gently() -> None:
    """Have compute threads sleep soon when they wait. Call before torch is imported: its thread pool reads it once."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)


def usable_processors(root: Path = Path("/")) -> int:
    """At least 1; a fraction of a processor counts as one. `root` holds the `proc` and `sys` to read."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min([allowed, *_quotas(root)])))


def _quotas(root: Path) -> Iterator[float]:
    """Processors granted by this process's control group and by each of those around it."""
    for folder in _folders(root):
        # Version 2: "max 100000" or "150000 100000"; version 1: two files, a quota of -1 for none.
        granted = _read(folder / "cpu.max").split() or [
            *_read(folder / "cpu.cfs_quota_us").split(),
            *_read(folder / "cpu.cfs_period_us").split(),
        ]
        if len(granted) == 2 and granted[0].isdecimal() and granted[1].isdecimal() and int(granted[1]) > 0:
            yield int(granted[0]) / int(granted[1])


def _folders(root: Path) -> Iterator[Path]:
    """The folders of the process's control groups that may limit processors, from the innermost out."""
    for mount_root, mount_point, controller in _mounts(root):
        for line in _read(root / "proc/self/cgroup").splitlines():
            _, names, path = line.split(":", 2)
            if controller not in names.split(","):
                continue
            # A container sees its own group as the root of the mount; its path may be the host's.
            inside = PurePosixPath(path)
            relative = inside.relative_to(mount_root) if inside.is_relative_to(mount_root) else PurePosixPath()
            top = root / mount_point.lstrip("/")
            folder = top / relative
            yield folder
            yield from (outer for outer in folder.parents if outer.is_relative_to(top))


def _mounts(root: Path) -> Iterator[tuple[str, str, str]]:
    """Root, mount point and controller (none for version 2) of every mounted hierarchy that may limit processors."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        fields = before.split(" ")
        if kind == "cgroup2":
            yield fields[3], fields[4], ""
        elif kind == "cgroup" and "cpu" in options.split(","):
            yield fields[3], fields[4], "cpu"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
