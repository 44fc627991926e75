"""A group of a round's requests, while what they share is being made ready."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvarn.serving.conversations import Resumption
from kvarn.serving.request import Request, RequestState
from kvarn.serving.rounds.barrier import Gathered
from kvarn.serving.rounds.segment import StoredSegment
from kvarn.serving.rounds.spans import Span


@dataclass(slots=True)
class RoundGroup:
    """Members that are worked on together."""

    gathered: Gathered[Request]
    members: list[Request]
    """Those that are still to be released."""
    segments: dict[int, list[tuple[Span, StoredSegment]]] = field(default_factory=dict)
    """Of each member, by its id() in memory, which segments stand where."""
    chain: list[StoredSegment] = field(default_factory=list)
    """Segments that are encoded behind one another."""
    before: dict[bytes, tuple[StoredSegment, ...]] = field(default_factory=dict)
    """By key, those of the chain before each."""
    sink: int = 0
    """Leading tokens of a prompt that segments are encoded behind."""
    resumed: dict[int, Resumption] = field(default_factory=dict)
    """Of members that go on with what another request left; their `segments` stand behind that."""
    resolved: bool = False
    waits_for: Request | None = None
    """In mode "serial", whoever has to get his first token before the next one is looked at."""

    def segments_of(self, request: Request) -> list[StoredSegment]:
        """All that a member reads."""
        resumption = self.resumed.get(id(request))
        old = [] if resumption is None else [each.segment for each in resumption.placed]
        return old + [segment for _, segment in self.segments.get(id(request), [])]

    @property
    def is_blocked(self) -> bool:
        request = self.waits_for
        return request is not None and not request.num_outputs and request.state is not RequestState.FINISHED


@dataclass(slots=True)
class RoundCounters:
    """Since the engine's start."""

    collected_rounds: int = 0
    late_members: int = 0
    encoded_tokens: int = 0
    loaded_segments: int = 0
    reused_tokens: int = 0
    refreshed_tokens: int = 0
    selection_passes: int = 0


def common_prefix(prompts: Sequence[NDArray[np.int32]]) -> int:
    """Leading tokens that all have in common."""
    shortest = min(map(len, prompts), default=0)
    common = shortest
    for prompt in prompts[1:]:
        differs = np.flatnonzero(prompt[:common] != prompts[0][:common])
        common = int(differs[0]) if len(differs) else common
    return common
