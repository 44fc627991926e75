"""Where the shared segments of a prompt are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvarn.serving.rounds.hints import Segment


class Span(NamedTuple):
    """Tokens `start` to `end` of a prompt."""

    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


def spans_of(segments: Iterable[Segment]) -> list[Span]:
    """Of the shared ones among the segments of a prompt."""
    spans: list[Span] = []
    position = 0
    for part in segments:
        if part.kind == "shared":
            spans.append(Span(position, position + part.tokens))
        position += part.tokens
    return spans
