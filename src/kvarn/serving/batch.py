"""One step's work: which rows of which requests are computed together, prefill chunks and decode rows mixed."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from kvarn.serving.request import Request


@dataclass(slots=True)
class ScheduledRequest:
    """`count` tokens of `request`, from position `request.num_computed` on."""

    request: Request
    count: int
    drafts: int = 0
    """How many of them, the last ones, are guesses at tokens to come (kvarn.serving.speculation)."""

    @property
    def samples(self) -> bool:
        """True when this step computes the request's last known token, so a new one is sampled from it."""
        return self.request.num_computed + self.count - self.drafts == self.request.num_tokens


@dataclass(slots=True)
class Batch:
    """What an executor computes in one forward pass. Every row's KV blocks are already in its request's block table."""

    rows: list[ScheduledRequest] = field(default_factory=list)
    decodes: bool = False
    """True when no row has prompt tokens left: the cost of such steps depends on their number of rows alone."""

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log-probability of one sampled token and of the most likely alternatives (natural log, before temperature)."""

    logprob: float
    top: list[tuple[int, float]]


class SampledToken(msgspec.Struct, array_like=True):
    """One token that an executor sampled."""

    token: int
    logprobs: TokenLogprobs | None = None
    grammar_done: bool = False
    """The grammar accepts nothing more: the request ends here."""
    error: str | None = None
    """Set when this row alone failed (a grammar that cannot go on); the request ends with reason "error"."""
