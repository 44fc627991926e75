"""What a client says of a prompt's parts and of the round it belongs to.

Agents that work in rounds get the same texts, the outputs of the last round, behind different private histories. A
*segment* is a stretch of a prompt that was made into tokens on its own, so the same text is the same tokens wherever
it stands; a *round* is the group of requests that get the same shared segments at about the same time.

Source: TokenDance (arXiv 2604.03143), 4.1, without its separator: a tokenizer may merge a separator with its
neighbours, so parts are given as parts.
"""

from __future__ import annotations

from typing import Literal

import msgspec

SegmentKind = Literal["private", "shared", "task"]
ReuseMode = Literal["exact", "serial", "batched", "collective", "lego"]


class Segment(msgspec.Struct, frozen=True, omit_defaults=True):
    """A stretch of a prompt; the segments of a prompt follow one another and cover it."""

    kind: SegmentKind
    tokens: int
    """How many tokens it has."""
    id: str = ""
    """What the client calls it: shown to people. What is the same is decided by comparing tokens."""


class RoundHint(msgspec.Struct, frozen=True, omit_defaults=True):
    """The group of requests that one of them belongs to."""

    id: str
    size: int
    """Requests that the round has in all."""
    agent: str = ""
    """Whose request this is: at most one of each in a round."""
