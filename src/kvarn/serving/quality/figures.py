"""What is measured of a way of reusing segments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quality:
    """Of one way of reuse, over all tokens of all references."""

    mean_kl: float
    """KL(exact || reused) of the next token's distribution, nats."""
    p95_kl: float
    top1: float
    """Tokens whose likeliest next token is the same."""
    first: float
    """Tasks whose first token is the same: what a judge chooses, where that is its first word."""
    perplexity_ratio: float
    """Of the references, reused : exact."""
    needle: float | None
    """Questions answered right : those that the exact engine answers right; None where there are none."""
    questions: int
    """That the exact engine answers right."""
    tokens: int
    """Compared."""
    refreshed: float
    """Of the tokens of shared segments, what was computed anew."""
