"""Segments without a model: tokens where a model would keep KV, read back wherever they are used."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from kvarn.serving.request import Request
from kvarn.serving.rounds.segment import StoredSegment
from kvarn.serving.rounds.work import EncodeJob, Probe

from .text_memory import TextMemory


class PagedTextSegments:
    """See kvarn.serving.rounds.work.SegmentExecutor. Where a segment deviates depends on its tokens alone."""

    def __init__(self, pages: TextMemory, num_blocks: int) -> None:
        self.pages = pages
        self.canonical = TextMemory(num_blocks, pages.block_size)
        self.encoded_tokens = 0
        self.fail_next = False

    @property
    def num_blocks(self) -> int:
        return len(self.canonical.tokens)

    def encode(self, jobs: Sequence[EncodeJob]) -> None:
        self._may_fail()
        for job in jobs:
            segment, first, count = job.segment, job.segment.encoded, job.count
            assert segment.pins > 0 and 0 < count <= segment.sink + segment.length - first
            if first == 0:
                self.pages.positions[segment.blocks] = -1
            rows = np.arange(first, first + count)
            start = segment.origin - segment.sink
            self.pages.write(self.pages.slots(segment.blocks, rows), segment.all_tokens[rows], start + rows)
            seen = [self.pages.slots(each.blocks, np.arange(each.sink + each.length)) for each in job.before]
            context = np.concatenate([*seen, self.pages.slots(segment.blocks, np.arange(first + count))])
            text = np.concatenate([segment.before, segment.all_tokens[: first + count]])
            assert np.array_equal(self.pages.tokens.reshape(-1)[context], text), "it is not encoded behind its texts"
            shown = slice(job.before[0].sink if job.before else 0, None)
            assert np.array_equal(self.pages.positions.reshape(-1)[context][shown], np.arange(len(text))[shown])
            assert all(each.is_encoded or any(each is other.segment for other in jobs) for each in job.before)
            self.pages.compute(context, start + rows)
            kept = self.canonical.slots(segment.canonical, rows)
            self.canonical.tokens.reshape(-1)[kept] = segment.all_tokens[rows]
            self.canonical.values.reshape(-1)[kept] = self.pages.values.reshape(-1)[context[start + rows]]
            self.encoded_tokens += count
            if first + count == segment.sink + segment.length:
                self._hide_sink(segment)

    def deviations(self, probes: Sequence[Probe]) -> list[list[np.ndarray]]:
        self._may_fail()
        found = []
        for probe in probes:
            prefix = self.pages.tokens[list(probe.prefix_blocks)].reshape(-1)
            assert np.array_equal(prefix, probe.request.tokens[: len(prefix)])
            assert len(prefix) <= probe.placed[0].start
            for each in probe.placed:
                self._check(each.segment)
                here = probe.request.tokens[each.start : each.end]
                assert np.array_equal(here, each.segment.tokens), "another segment stands here"
            found.append([self._deviation(each.segment) for each in probe.placed])
        return found

    def load(self, segments: Sequence[StoredSegment]) -> None:
        self._may_fail()
        for segment in segments:
            self._check(segment)
            rows = np.arange(segment.sink + segment.length)
            self.pages.positions[segment.blocks] = -1
            start = segment.origin - segment.sink
            self._copy(segment, rows, self.pages.slots(segment.blocks, rows), start + rows)
            self._hide_sink(segment)

    def copy_in(self, request: Request) -> None:
        layout, size = request.layout, self.pages.block_size
        assert layout is not None
        self._may_fail()
        self.pages.positions[request.blocks[request.exact_tokens // size :]] = -1
        for each in layout.placed:
            self._check(each.segment)
            kept = np.flatnonzero(~each.recomputed(size))
            copied = {copy.number for copy in layout.copies if copy.segment is each.segment}
            assert set(((kept + each.segment.sink) // size).tolist()) <= copied
            slots = self.pages.slots(request.blocks, layout.slots[each.start + kept])
            self._copy(each.segment, each.segment.sink + kept, slots, each.start + kept)

    def read(self, blocks: Sequence[int]) -> np.ndarray:
        self._may_fail()
        return _bytes(self.pages, blocks)

    def write(self, request: Request, first: int, blocks: np.ndarray) -> None:
        self._may_fail()
        layout, size = request.layout, self.pages.block_size
        assert layout is not None
        _fill(self.pages, request.blocks[first : first + len(blocks)], blocks)
        places = np.arange(first * size, layout.resumed)
        positions, slots = layout.order[places], self.pages.slots(request.blocks, places)
        assert np.array_equal(self.pages.tokens.reshape(-1)[slots], request.tokens[positions]), "another's blocks"
        self.pages.positions.reshape(-1)[slots] = positions

    def read_segment(self, segment: StoredSegment) -> np.ndarray:
        self._check(segment)
        return _bytes(self.canonical, segment.canonical)

    def write_segment(self, segment: StoredSegment, blocks: np.ndarray) -> None:
        _fill(self.canonical, segment.canonical, blocks)

    def _may_fail(self) -> None:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("boom")

    def _copy(self, segment: StoredSegment, rows: np.ndarray, slots: np.ndarray, positions: np.ndarray) -> None:
        source = self.canonical.slots(segment.canonical, rows)
        self.pages.write(slots, self.canonical.tokens.reshape(-1)[source], positions)
        self.pages.values.reshape(-1)[slots] = self.canonical.values.reshape(-1)[source]

    def _check(self, segment: StoredSegment) -> None:
        assert segment.is_encoded and segment.pins > 0
        places = self.canonical.slots(segment.canonical, np.arange(segment.sink + segment.length))
        assert np.array_equal(self.canonical.tokens.reshape(-1)[places], segment.all_tokens), "segment memory is lost"

    def _hide_sink(self, segment: StoredSegment) -> None:
        self.pages.positions.reshape(-1)[self.pages.slots(segment.blocks, np.arange(segment.sink))] = -1

    def _deviation(self, segment: StoredSegment) -> np.ndarray:
        drawn = np.random.default_rng(zlib.crc32(segment.tokens.tobytes())).random(segment.length)
        return drawn.astype(np.float32)


def _bytes(memory: TextMemory, blocks: Sequence[int]) -> np.ndarray:
    """[n, 1, 1, 1, B, 8]: tokens and values."""
    both = np.stack([memory.tokens[list(blocks)].view(np.uint32), memory.values[list(blocks)]], axis=-1)
    return both.view(np.uint8)[:, None, None, None]


def _fill(memory: TextMemory, blocks: Sequence[int], content: np.ndarray) -> None:
    both = np.ascontiguousarray(content[:, 0, 0, 0]).view(np.uint32)
    memory.tokens[list(blocks)], memory.values[list(blocks)] = both[..., 0].view(np.int32), both[..., 1]
