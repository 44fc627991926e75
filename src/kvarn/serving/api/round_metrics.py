"""What /metrics shows of rounds and shared segments. No labels: names that clients choose are in /v1/rounds alone."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from kvarn.serving.rounds_report import RoundFacts

_TOTALS: Final = (
    ("collected_rounds", "kvarn_rounds", "Rounds whose wait is over."),
    ("late_members", "kvarn_round_late_members", "Requests that came after their round's wait was over."),
    ("segment_hits", "kvarn_segment_hits", "Segments of requests whose KV was there."),
    ("segment_misses", "kvarn_segment_misses", "Segments of requests whose KV had to be made."),
    ("encoded_tokens", "kvarn_segment_encoded_tokens", "Tokens of segments computed alone."),
    ("reused_tokens", "kvarn_segment_reused_tokens", "Prompt tokens whose KV was that of shared segments."),
    ("refreshed_tokens", "kvarn_segment_refreshed_tokens", "Tokens of segments computed anew where they stand."),
    ("selection_passes", "kvarn_segment_selection_passes", "Passes that found the tokens to compute anew."),
    ("resumed_requests", "kvarn_resumed_requests", "Requests that went on where one stopped that had ended."),
    ("resumed_tokens", "kvarn_resumed_tokens", "Tokens with KV of their own that these need not compute."),
)
_NOW: Final = (
    ("waiting_members", "kvarn_round_waiting_members", "Requests that wait for their round, or for its segments."),
    ("segment_tokens_held", "kvarn_segment_tokens", "Tokens in the store of segments."),
    ("segment_bytes", "kvarn_segment_bytes", "Host memory that they take."),
    ("mirror_bytes", "kvarn_mirror_bytes", "KV kept of requests that ended, as it is stored."),
    ("dense_bytes", "kvarn_mirror_dense_bytes", "What the same would take in full."),
)
"""(field of RoundFacts, metric, help)"""


class RoundMetrics:
    """From `RoundFacts` since the engine's start; ours go on when another engine counts from zero."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._totals = [(field, Counter(name, help, registry=registry)) for field, name, help in _TOTALS]
        self._now = [(field, Gauge(name, help, registry=registry)) for field, name, help in _NOW]
        self._last = RoundFacts()

    def note(self, facts: RoundFacts) -> None:
        last, self._last = self._last, facts
        for field, counter in self._totals:
            counter.inc(max(0, getattr(facts, field) - getattr(last, field)))
        for field, gauge in self._now:
            gauge.set(getattr(facts, field))

    def restart(self) -> None:
        """Another engine begins: nothing is held, and it counts from zero."""
        self._last = RoundFacts()
        for _, gauge in self._now:
            gauge.set(0)
