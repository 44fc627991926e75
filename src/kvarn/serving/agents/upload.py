"""When a conversation's KV comes back to the device: just before its tool is expected to answer, block by block.

Bringing it back takes free blocks, which are scarce whenever it was worth copying it out; taking them all at once may
take longer than the tool. So for some steps before the upload is due blocks are reserved, a share in each, such that
the last one is there in time. What idle conversations hold for their return is bounded: it serves nobody yet.

Source: TokenCake (arXiv 2510.18586), 3.4, which gives no schedule; the note's C6.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

_SLACK_SECONDS = 0.1
_CAUTION = 1.25
"""Copies are taken to last so many times their estimate."""


@dataclass(frozen=True, slots=True)
class Return:
    """One conversation that is off the device. Times in seconds from now."""

    blocks: int
    """That it lacks on the device."""
    reserved: int
    early: float
    """When its tool has answered with a probability of one in five; 0: it has."""
    copy_seconds: float
    """To bring it back, behind what is queued."""


@dataclass(frozen=True, slots=True)
class ReturnStep:
    """What to do in this step: reserve so many more blocks, or start the upload."""

    reserve: int = 0
    upload: bool = False


def next_step(
    back: Return, *, step_seconds: float, lead: int, free: int, allowance: int, gradual: bool = True
) -> ReturnStep:
    """What this step does for a return; `free` blocks may be taken, `allowance` of them by idle conversations.

    lead      steps before the upload from which on blocks are reserved
    gradual   in shares; else all at once when the upload is due
    """
    due = back.early - _CAUTION * back.copy_seconds - _SLACK_SECONDS
    missing = back.blocks - back.reserved
    room = max(0, min(free, allowance))
    if due <= 0:
        return ReturnStep(upload=missing <= room) if not gradual or missing <= room else ReturnStep(reserve=room)
    if not gradual or due > lead * step_seconds or missing <= 0:
        return ReturnStep()
    steps_left = max(1, int(due / step_seconds))
    return ReturnStep(reserve=min(ceil(missing / steps_left), room))
