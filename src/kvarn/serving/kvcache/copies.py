"""What the KV tiers ask of whatever copies blocks: a thread, a CUDA stream, or a simulated link."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal, Protocol


class Direction(enum.Enum):
    TO_HOST = "to host"
    TO_DEVICE = "to device"


@dataclass(slots=True, eq=False)
class CopyJob:
    """Blocks to copy one way, pairwise: device block `blocks[i]` and host slot `slots[i]`."""

    direction: Direction
    blocks: list[int]
    slots: list[int]
    starts: list[int]
    """Position of the first token in each block."""
    seconds: float = 0.0
    """How long it took, once it has ended, without what it waited for others."""
    error: str | None = None
    """Why it failed; nothing of it may be used then."""


@dataclass(frozen=True, slots=True)
class CopyRules:
    """When blocks are copied; other values than the defaults show what each rule is worth."""

    write_ahead: Literal["most slack first", "in order", "off"] = "most slack first"
    """Whose new blocks are copied to the host in each step, while they still run; off: only when they give them up."""
    overlap: bool = True
    """Copies run beside the compute; else each step waits for those that it started."""


class Copier(Protocol):
    """Copies blocks beside the compute, one queue each way, in the order they are handed over."""

    def start(self, job: CopyJob) -> None:
        """Queue a job. Its device blocks and host slots belong to it until `finished` returns it."""
        ...

    def finished(self) -> list[CopyJob]:
        """Jobs that have ended since the last call. Never waits."""
        ...

    def wait(self, seconds: float) -> None:
        """Return when a job has ended that `finished` has not told, or after `seconds`."""
        ...

    def close(self) -> None:
        """Finish what is queued; `finished` tells of it once more, and nothing is started after this."""
        ...
