"""Blocks set aside for the agents that matter most, so that minor ones cannot fill the device before they come.

Agents are told apart by *type*, their role. Every second or so the best-scored types become critical, and the reserve
grows while the device is full and shrinks while it is empty; each critical type gets a share of it, by what it uses and
by its score. Whoever is admitted takes from what is nobody's first, then from his own reserve, then from reserves whose
owners have nobody waiting. Reserves bind admissions alone: who is in grows as he must.

Source: TokenCake (arXiv 2510.18586), Algorithm 2, whose shares sum to less than the reserve (`published`); bounds and
hysteresis from the authors' port.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil


@dataclass(frozen=True)
class ReservationSettings:
    """Shares of the device, and seconds."""

    high: float = 0.75
    """Usage from which on the reserve grows."""
    low: float = 0.40
    """Usage down to which it shrinks."""
    step: float = 0.05
    smallest: float = 0.05
    largest: float = 0.30
    critical: float = 0.5
    """Share of the types that are critical, the best-scored ones."""
    period: float = 1.0
    published: bool = False
    """Shares as in Algorithm 2, to the letter: part of the reserve is nobody's."""


@dataclass
class Reservations:
    """The plan of one device."""

    settings: ReservationSettings
    num_blocks: int
    ratio: float = 0.0
    """The reserve's share of the device."""
    shares: dict[str, int] = field(default_factory=dict)
    """Critical type -> blocks set aside for it."""
    updated_at: float = float("-inf")

    def update(self, now: float, used: Mapping[str, int], scores: Mapping[str, float]) -> None:
        """A new plan, where it is time: from the blocks that each type uses, and its score (higher matters more)."""
        settings = self.settings
        if now < self.updated_at + settings.period:
            return
        self.updated_at = now
        usage = sum(used.values()) / self.num_blocks
        if usage >= settings.high:
            self.ratio += settings.step
        elif usage <= settings.low:
            self.ratio -= settings.step
        self.ratio = max(settings.smallest, min(settings.largest, self.ratio))
        count = ceil(settings.critical * len(scores))
        critical = sorted(scores, key=lambda kind: (-scores[kind], kind))[:count]
        self.shares = self._shares(critical, used, scores)

    def _shares(self, critical: list[str], used: Mapping[str, int], scores: Mapping[str, float]) -> dict[str, int]:
        total = self.num_blocks * self.ratio
        lowest = min((scores[kind] for kind in critical), default=0.0)
        weights = {kind: scores[kind] - min(lowest, 0.0) for kind in critical}
        sum_scores = sum(weights.values()) or 1.0
        whole = self.num_blocks if self.settings.published else max(1, sum(used.get(kind, 0) for kind in critical))
        parts = {kind: (used.get(kind, 0) / whole + weights[kind] / sum_scores) / 2 for kind in critical}
        if not self.settings.published:
            norm = sum(parts.values()) or 1.0
            parts = {kind: part / norm for kind, part in parts.items()}
        return {kind: int(total * part) for kind, part in parts.items()}

    def withheld(self, kind: str, used: Mapping[str, int], waiting: Mapping[str, int]) -> int:
        """Blocks that a request of this type must leave: what critical types have not used of their reserves, as far
        as they have requests waiting that want it (`waiting`: blocks)."""
        return sum(
            min(max(0, share - used.get(other, 0)), waiting.get(other, 0))
            for other, share in self.shares.items()
            if other != kind
        )
