"""What a policy can decide of a conversation whose agent waits for a tool."""

from __future__ import annotations

from typing import Literal, NamedTuple

Verb = Literal["offload", "release", "discard", "reserve", "upload", "retreat"]


class StallMove(NamedTuple):
    """What is to become of a stall.

    offload   copy what the host lacks of it, and give the device blocks up
    release   give device blocks and host slots up: they stay as prefix cache
    discard   the same, and the device forgets what was in blocks that nobody shares
    reserve   hold `blocks` more free device blocks for its return
    upload    bring it back now
    retreat   give up what is reserved, or what was brought back; the host keeps it
    """

    id: str
    verb: Verb
    blocks: int = 0
