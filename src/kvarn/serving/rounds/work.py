"""What a round asks of whatever computes: to encode segments, to look where they deviate, to copy them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from kvarn.serving.rounds.layout import Placed
from kvarn.serving.rounds.segment import StoredSegment

if TYPE_CHECKING:
    from kvarn.serving.request import Request


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """Compute the next `count` tokens of a segment, its sink before it."""

    segment: StoredSegment
    count: int
    before: tuple[StoredSegment, ...] = ()
    """Segments that it sees, the first of which has the sink."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Look at a request's segments where they stand in it."""

    request: Request
    prefix_blocks: tuple[int, ...]
    """Device blocks with the KV of its leading tokens."""
    placed: tuple[Placed, ...]


class SegmentExecutor(Protocol):
    """Computes for rounds; holds the segment memory. Each call is done when it returns."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the segment memory."""
        ...

    @property
    def block_bytes(self) -> int:
        """Of one of these."""
        ...

    def encode(self, jobs: Sequence[EncodeJob]) -> None:
        """Fill device blocks and segment memory with the tokens of the jobs."""
        ...

    def deviations(self, probes: Sequence[Probe]) -> list[list[NDArray[np.float32]]]:
        """For each probe and each of its segments, how far each token's key is from the stored one, squared."""
        ...

    def load(self, segments: Sequence[StoredSegment]) -> None:
        """Fill device blocks of encoded segments from the segment memory."""
        ...

    def copy_in(self, request: Request) -> None:
        """Fill the request's own blocks with the segments that its layout copies."""
        ...

    def read(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """[n, L, 2, Hkv, B, bytes]: what device blocks hold, byte by byte, whatever the type of KV."""
        ...

    def write(self, request: Request, first: int, blocks: NDArray[np.uint8]) -> None:
        """Fill the request's own blocks from number `first` on with what was read."""
        ...

    def read_segment(self, segment: StoredSegment) -> NDArray[np.uint8] | None:
        """An encoded segment's blocks of the segment memory; None where they have another form than device blocks."""
        ...

    def write_segment(self, segment: StoredSegment, blocks: NDArray[np.uint8]) -> None:
        """Fill a segment's blocks of the segment memory with what was read."""
        ...
