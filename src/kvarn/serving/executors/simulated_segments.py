"""Segments on a simulated device: nothing is kept, and the clock says what each part of a round takes. No torch.

Where a segment deviates is drawn from its content, so every run chooses the same blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from kvarn.hardware.roofline import Roofline
from kvarn.serving.clock import VirtualClock
from kvarn.serving.request import Request
from kvarn.serving.rounds.segment import StoredSegment
from kvarn.serving.rounds.work import EncodeJob, Probe


class SimulatedSegments:
    """See kvarn.serving.rounds.work.SegmentExecutor. The segment memory is on the host, behind the device's link."""

    def __init__(
        self, roofline: Roofline, clock: VirtualClock, *, num_blocks: int, block_size: int, check_layer: int = 1
    ) -> None:
        self.roofline = roofline
        self.clock = clock
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._looked_at = (check_layer + _PROJECTION) / roofline.model.layers
        """Of the work of all layers, what looking for deviations takes."""

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def block_bytes(self) -> int:
        return int(self._block_size * self.roofline.model.kv_bytes_per_token(self.roofline.kv_bytes))

    def encode(self, jobs: Sequence[EncodeJob]) -> None:
        self._compute([(job.segment.encoded, job.count) for job in jobs])

    def deviations(self, probes: Sequence[Probe]) -> list[list[NDArray[np.float32]]]:
        pasts = [len(probe.prefix_blocks) * self._block_size for probe in probes]
        rows = [(past, probe.placed[-1].end - past) for past, probe in zip(pasts, probes, strict=True)]
        self._compute(rows, self._looked_at)
        return [[_deviation(each.segment) for each in probe.placed] for probe in probes]

    def load(self, segments: Sequence[StoredSegment]) -> None:
        self._move(sum(len(segment.canonical) for segment in segments))

    def copy_in(self, request: Request) -> None:
        assert request.layout is not None
        self._move(len(request.layout.copies))

    def read(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        self._move(len(blocks))
        return _no_content(len(blocks))

    def write(self, request: Request, first: int, blocks: NDArray[np.uint8]) -> None:
        self._move(len(blocks))

    def read_segment(self, segment: StoredSegment) -> NDArray[np.uint8] | None:
        return _no_content(len(segment.canonical))

    def write_segment(self, segment: StoredSegment, blocks: NDArray[np.uint8]) -> None:
        pass

    def _compute(self, rows: Sequence[tuple[int, int]], share: float = 1.0) -> None:
        fixed = self.roofline.accelerator.step_seconds
        whole = self.roofline.seconds(0, 0, rows, 0)
        self.clock.advance(fixed + max(0.0, whole - fixed) * share)

    def _move(self, blocks: int) -> None:
        self.clock.advance(blocks * self.block_bytes / self.roofline.accelerator.host_to_device)


_PROJECTION = 0.25
"""Queries, keys and values of the layer looked at, of the work of a layer."""


def _no_content(blocks: int) -> NDArray[np.uint8]:
    """A byte for each."""
    return np.zeros((blocks, 1, 1, 1, 1, 1), dtype=np.uint8)


def _deviation(segment: StoredSegment) -> NDArray[np.float32]:
    drawn = np.random.default_rng(crc32(segment.tokens.tobytes())).random(segment.length)
    deviations: NDArray[np.float32] = drawn.astype(np.float32)
    return deviations
