"""Accelerators as data: a name or a profile file in, an `Accelerator` out.

A name is a table of `accelerators.toml`, which says where each figure comes from; a file is what `kvarn calibrate`
wrote, or one of the same form written by hand.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from kvarn.errors import KvarnError
from kvarn.hardware.tables import bundled_tables, pick, read_tables, record, write_table


@dataclass(frozen=True)
class Accelerator:
    """What one device can do. Shares are what real programs reach of a peak, above 0."""

    name: str
    title: str
    memory_bytes: int
    """Bytes for weights, KV cache and everything else."""
    memory_bandwidth: float
    """Peak bytes read per second."""
    flops: float
    """Peak dense bfloat16 operations per second; a multiply-add counts as two."""
    weights_share: float
    """Of `memory_bandwidth`, when a step waits for its weights."""
    compute_share: float
    """Of `flops`, when a step waits for its matrix products."""
    kv_share: float
    """Of `memory_bandwidth`, when attention waits for keys and values."""
    attention_share: float
    """Of `flops`, when attention waits for its products."""
    overlap: bool
    """Whether reading weights and multiplying with them run at the same time, or take turns."""
    step_seconds: float
    """Seconds that a step takes beside all that: scheduling, launching, sampling."""
    sequence_seconds: float
    """Further seconds for each sequence in a step."""
    chunk_seconds: float
    """Further seconds for each sequence that computes several tokens, where attention takes prompts one by one."""
    host_memory_bytes: int
    """Bytes of host memory for offloaded KV."""
    host_to_device: float
    """Bytes per second of the link towards the device."""
    device_to_host: float
    """Bytes per second of the link towards the host."""
    duplex: bool
    """Whether both ways run at full speed at once."""
    token_budget: int
    """Default of an engine here: tokens that one step may compute."""
    prefill_budget: int
    """Default of an engine here: prompt tokens in a step that also decodes."""
    max_running: int
    """Default of an engine here: requests in one batch."""

    def __post_init__(self) -> None:
        for field in _POSITIVE:
            value = getattr(self, field)
            if not 0 < value < float("inf"):
                raise KvarnError(f"{field} of {self.name} is {value}; expected a number above 0")
        for field in ("step_seconds", "sequence_seconds", "chunk_seconds"):
            value = getattr(self, field)
            if not 0 <= value < float("inf"):
                raise KvarnError(f"{field} of {self.name} is {value}; expected seconds from 0 on")


_POSITIVE = (
    "memory_bytes", "memory_bandwidth", "flops", "weights_share", "compute_share", "kv_share", "attention_share",
    "host_memory_bytes", "host_to_device", "device_to_host", "token_budget", "prefill_budget", "max_running",
)  # fmt: skip


def known_accelerators() -> dict[str, Accelerator]:
    """Every accelerator of the data file by its name."""
    tables = bundled_tables("accelerators.toml")
    return {name: record(Accelerator, name, table, "accelerators.toml") for name, table in tables.items()}


def load_accelerator(name: str) -> Accelerator:
    """An accelerator by name (any case) or from a profile file; KvarnError that lists the known names."""
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        tables = read_tables(path)
        if len(tables) > 1:
            raise KvarnError(f"{path} holds {len(tables)} tables; expected one accelerator")
        ((title, table),) = tables.items()
        return record(Accelerator, title, table, str(path))
    tables = bundled_tables("accelerators.toml")
    table = pick(tables, name.lower(), "hardware", "name a profile file (.toml) that `kvarn calibrate` wrote")
    return record(Accelerator, name.lower(), table, "accelerators.toml")


def save_accelerator(accelerator: Accelerator, path: Path, comments: list[str]) -> None:
    """Write a profile that `load_accelerator` reads back equal."""
    table = asdict(accelerator)
    write_table(path, table.pop("name"), table, comments)
