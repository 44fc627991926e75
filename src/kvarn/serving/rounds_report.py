"""What the engine tells of rounds: facts in sums, and the last rounds one by one.

Who collects rounds counts; the engine process asks between two steps, and passes the answers on. Nothing here decides.
"""

from __future__ import annotations

import msgspec

from kvarn.serving.rounds.hints import ReuseMode


class RoundFacts(msgspec.Struct, frozen=True, array_like=True):
    """Rounds and segments. Counted since the engine's start, but for what waits or is held now."""

    collected_rounds: int = 0
    """Rounds whose wait is over."""
    late_members: int = 0
    """Requests that came after their round's wait was over."""
    waiting_members: int = 0
    """Requests that wait now for others of their round, or for segments to be encoded."""
    segment_hits: int = 0
    """Segments of requests whose KV was there."""
    segment_misses: int = 0
    """Those whose KV had to be made."""
    encoded_tokens: int = 0
    """Tokens of segments computed alone."""
    reused_tokens: int = 0
    """Prompt tokens whose KV was that of shared segments."""
    refreshed_tokens: int = 0
    """Tokens of shared segments that were computed anew where they stand."""
    selection_passes: int = 0
    segment_tokens_held: int = 0
    """In the store of segments now."""
    segment_bytes: int = 0
    """Of host memory that they take."""
    mirror_bytes: int = 0
    """What is kept of requests that ended, as it is stored."""
    dense_bytes: int = 0
    """What the same would take in full."""
    resumed_requests: int = 0
    """Requests that went on where one stopped that had ended."""
    resumed_tokens: int = 0
    """Tokens with KV of their own that these need not compute."""


class RoundReport(msgspec.Struct, frozen=True, array_like=True):
    """One round, as it was when its wait was over."""

    id: str
    members: int
    """Requests that it was to have."""
    arrived: int
    """Those that have come so far."""
    waited_seconds: float
    mode: ReuseMode
    segments: int
    """Shared segments, each counted once."""
    reused_tokens: int
    refreshed_tokens: int
