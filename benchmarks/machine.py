"""The machine a benchmark runs on: what it is, and how much of it somebody else is using meanwhile (Linux)."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_IDLE, _IOWAIT = 3, 4
QUIET_CORES = 0.15
"""Foreign load below which a run counts as undisturbed."""


def describe() -> dict[str, object]:
    """Processor, cores usable by this process, memory, and the instruction sets that matter here."""
    info = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines() if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    flags = set(values.get("flags", "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": values.get("model name", platform.processor()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "instructions": [flag for flag in known if flag in flags],
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }


@dataclass
class ForeignLoad:
    """Cores kept busy by processes that are not this one's descendants, between two moments."""

    _started: float = field(default_factory=time.monotonic)
    _busy: float = field(default_factory=lambda: _machine_busy())
    _own: float = field(default_factory=lambda: _own_busy())

    def cores(self) -> float:
        """Foreign busy cores on average since this object was made."""
        foreign = (_machine_busy() - self._busy) - (_own_busy() - self._own)
        return max(0.0, foreign / max(1e-3, time.monotonic() - self._started))


def wait_until_quiet(limit: float) -> None:
    """Wait until the foreign load is below QUIET_CORES, but no longer than `limit` seconds."""
    give_up = time.monotonic() + limit
    while time.monotonic() < give_up:
        load = ForeignLoad()
        time.sleep(min(0.5, limit))
        if load.cores() < QUIET_CORES:
            return


def _machine_busy() -> float:
    """Seconds of processor time used since boot, over all cores."""
    ticks = [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[_IDLE] - ticks[_IOWAIT]) / _TICKS


def _own_busy() -> float:
    """Seconds of processor time used by this process and its living and reaped descendants."""
    fields = _process_fields()
    return sum(sum(int(ticks) for ticks in fields[pid][11:15]) for pid in _family(os.getpid(), fields)) / _TICKS


def family(pid: int) -> set[int]:
    """A process and its living descendants."""
    return _family(pid, _process_fields())


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, pages that it shares counted by its share (PSS); 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def _process_fields() -> dict[int, list[str]]:
    """/proc/PID/stat of every process, what follows its name: state, parent, ..."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended meanwhile
    return found


def _family(pid: int, fields: dict[int, list[str]]) -> set[int]:
    members = {pid} & fields.keys()
    while more := {one for one, parts in fields.items() if int(parts[1]) in members and one not in members}:
        members |= more
    return members
