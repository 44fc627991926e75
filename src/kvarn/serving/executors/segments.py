"""Segments on a torch device: encodes them, keeps their KV in a form that fits every place, and copies it to places.

The segment memory holds keys before rotation and values, in the model's dtype, block by block as in the KV pool.
Rotated for a place, such a key is bit for bit what computing it there gives, as far as its layer's input is the same.

Source: TokenDance (arXiv 2604.03143), 4.2 and 4.4; CacheBlend (arXiv 2405.16444) for deviation as the squared distance
of keys, here before rotation, which leaves distances as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.kernels import ops
from kvarn.models.spec import ForwardBatch, KVMemory, ModelSpec
from kvarn.serving.executors.host_memory import host_pages
from kvarn.serving.request import Request
from kvarn.serving.rounds.segment import StoredSegment
from kvarn.serving.rounds.work import EncodeJob, Probe


class SegmentDecoder(Protocol):
    """A decoder that rounds can work with (kvarn.models.decoder_llama.LlamaDecoder)."""

    spec: ModelSpec
    cos_sin: torch.Tensor

    def encode(self, batch: ForwardBatch, kv: KVMemory) -> tuple[torch.Tensor, torch.Tensor]: ...
    def early_keys(self, batch: ForwardBatch, kv: KVMemory, layer: int) -> torch.Tensor: ...


class TorchSegments:
    """See kvarn.serving.rounds.work.SegmentExecutor.

    check_layer   the layer, from 1 on, whose keys are compared: those of layer 0 do not depend on what stands before
    """

    def __init__(self, decoder: SegmentDecoder, kv: KVMemory, num_blocks: int, *, check_layer: int = 1) -> None:
        self.decoder = decoder
        self.kv = kv
        self.check_layer = check_layer
        self.block_size = kv.slot_positions.shape[1]
        block, element = decoder.spec.kv_block(self.block_size, decoder.spec.dtype)
        self.memory = host_pages((num_blocks, *block), element)
        self._device = kv.pages.device
        self._none = torch.empty(0, dtype=torch.int64, device=self._device)

    @property
    def num_blocks(self) -> int:
        return int(self.memory.shape[0])

    @property
    def block_bytes(self) -> int:
        return self.memory[0].nbytes

    @torch.inference_mode()
    def encode(self, jobs: Sequence[EncodeJob]) -> None:
        size, flat = self.block_size, self.kv.slot_positions.view(-1)
        rows = [np.arange(job.segment.encoded, job.segment.encoded + job.count) for job in jobs]
        for job in jobs:
            if job.segment.encoded == 0:
                self.kv.slot_positions[self._tensor(job.segment.blocks)] = -1
            for first in job.before[:1]:
                self._show_sink(first)
        tables = [[block for each in (*job.before, job.segment) for block in each.blocks] for job in jobs]
        batch = self._batch(
            [job.segment.all_tokens[each] for job, each in zip(jobs, rows, strict=True)],
            [each + job.segment.origin - job.segment.sink for job, each in zip(jobs, rows, strict=True)],
            [_slots(job.segment.blocks, each, size) for job, each in zip(jobs, rows, strict=True)],
            tables,
        )
        flat[batch.slots.long()] = batch.positions
        try:
            keys, values = self.decoder.encode(batch, self.kv)
        finally:
            for job in jobs:
                for first in job.before[:1]:
                    self._hide_sink(first)
        stored = [_slots(job.segment.canonical, each, size) for job, each in zip(jobs, rows, strict=True)]
        blocks, offsets = (torch.from_numpy(part) for part in np.divmod(np.concatenate(stored), size))
        for plane, computed in enumerate((keys, values)):  # [L, T, Hkv, D]
            self.memory[blocks, :, plane, :, offsets] = computed.transpose(0, 1).to(self.memory.device)
        for job in jobs:
            if job.segment.encoded + job.count == job.segment.sink + job.segment.length:
                self._hide_sink(job.segment)

    def _hide_sink(self, segment: StoredSegment) -> None:
        slots = _slots(segment.blocks, np.arange(segment.sink), self.block_size)
        self.kv.slot_positions.view(-1)[self._tensor(slots)] = -1

    def _show_sink(self, segment: StoredSegment) -> None:
        """Its KV still is where it was."""
        slots = _slots(segment.blocks, np.arange(segment.sink), self.block_size)
        positions = torch.arange(segment.sink, dtype=torch.int32, device=self._device)
        self.kv.slot_positions.view(-1)[self._tensor(slots)] = positions

    @torch.inference_mode()
    def deviations(self, probes: Sequence[Probe]) -> list[list[NDArray[np.float32]]]:
        size = self.block_size
        begins = [len(probe.prefix_blocks) * size for probe in probes]
        ends = [probe.placed[-1].end for probe in probes]
        needed = [-(-end // size) for end in ends]
        firsts = np.concatenate([[0], np.cumsum(needed)]).tolist()
        pages = self.kv.pages
        scratch = KVMemory(
            torch.empty((firsts[-1], self.check_layer, *pages.shape[2:]), dtype=pages.dtype, device=pages.device),
            torch.full((firsts[-1], size), -1, dtype=torch.int32, device=pages.device),
        )
        tables = [list(range(first, first + count)) for first, count in zip(firsts, needed, strict=False)]
        for probe, table in zip(probes, tables, strict=True):
            count = len(probe.prefix_blocks)
            scratch.pages[table[:count]] = pages[self._tensor(probe.prefix_blocks), : self.check_layer]
            scratch.place(table[:count], [i * size for i in range(count)])
        positions = [np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)]
        batch = self._batch(
            [probe.request.tokens[each] for probe, each in zip(probes, positions, strict=True)],
            positions,
            [_slots(table, each, size) for table, each in zip(tables, positions, strict=True)],
            tables,
        )
        scratch.slot_positions.view(-1)[batch.slots.long()] = batch.positions
        keys = self.decoder.early_keys(batch, scratch, self.check_layer)
        found, first = [], 0
        for probe, begin, end in zip(probes, begins, ends, strict=True):
            rows = keys[first : first + end - begin]
            spans = [(each.segment, rows[each.start - begin : each.end - begin]) for each in probe.placed]
            found.append([self._distance(fresh, segment) for segment, fresh in spans])
            first += end - begin
        return found

    def _distance(self, fresh: torch.Tensor, segment: StoredSegment) -> NDArray[np.float32]:
        where = _slots(segment.canonical, np.arange(segment.sink, segment.sink + segment.length), self.block_size)
        blocks, offsets = (torch.from_numpy(part) for part in np.divmod(where, self.block_size))
        stored = self.memory[blocks, self.check_layer, 0, :, offsets].to(fresh.device)
        distance: NDArray[np.float32] = (fresh.float() - stored.float()).square().sum(dim=(1, 2)).cpu().numpy()
        return distance

    @torch.inference_mode()
    def load(self, segments: Sequence[StoredSegment]) -> None:
        size = self.block_size
        sources = [block for segment in segments for block in segment.canonical]
        starts = [start for segment in segments for start in segment.first_positions(size)]
        targets = [block for segment in segments for block in segment.blocks]
        self._restore(sources, starts, targets)
        self.kv.place(targets, starts)
        for segment in segments:
            positions = np.arange(segment.sink + segment.length, len(segment.blocks) * size)
            unused = _slots(segment.blocks, positions, size)
            self.kv.slot_positions.view(-1)[self._tensor(unused)] = -1
            self._hide_sink(segment)

    @torch.inference_mode()
    def copy_in(self, request: Request) -> None:
        layout, size = request.layout, self.block_size
        assert layout is not None
        own = request.blocks
        flat = self.kv.slot_positions.view(-1)
        # All slots up to the last segment are looked at from the start: what others left in them must not be seen.
        self.kv.slot_positions[self._tensor(own[request.exact_tokens // size :])] = -1
        for each in layout.placed:
            kept = each.start + np.flatnonzero(~each.recomputed(size))
            flat[self._tensor(_slots(own, layout.slots[kept], size))] = self._tensor(kept).int()
        copies = layout.copies
        if not copies:
            return
        self._restore(
            [copy.segment.canonical[copy.number] for copy in copies],
            [copy.start for copy in copies],
            [own[copy.own] for copy in copies],
        )

    @torch.inference_mode()
    def read(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        pages = self.kv.pages
        return _bytes(pages[self._tensor(blocks)].cpu(), pages.shape[1:4], self.block_size)

    @torch.inference_mode()
    def write(self, request: Request, first: int, blocks: NDArray[np.uint8]) -> None:
        pages, layout, own = self.kv.pages, request.layout, request.blocks
        assert layout is not None
        content = torch.from_numpy(blocks).reshape(len(blocks), *pages.shape[1:-1], -1).view(pages.dtype)
        pages[self._tensor(own[first : first + len(blocks)])] = content.to(pages.device)
        slots = np.arange(first * self.block_size, layout.resumed)
        places = self._tensor(_slots(own, slots, self.block_size))
        self.kv.slot_positions.view(-1)[places] = self._tensor(layout.order[slots]).int()

    def read_segment(self, segment: StoredSegment) -> NDArray[np.uint8] | None:
        if self.memory.dtype != self.kv.pages.dtype:
            return None
        return _bytes(self.memory[segment.canonical], self.memory.shape[1:4], self.block_size)

    def write_segment(self, segment: StoredSegment, blocks: NDArray[np.uint8]) -> None:
        self.memory[segment.canonical] = torch.from_numpy(blocks).view(self.memory.dtype)

    def _restore(self, sources: list[int], starts: list[int], targets: list[int]) -> None:
        memory = self.memory
        if self._device.type != "cpu":  # only what is used crosses the link
            used = sorted(set(sources))
            memory = self.memory[used].to(self._device, non_blocking=True)
            sources = [used.index(source) for source in sources]
        where = torch.tensor([sources, starts, targets], dtype=torch.int32, device=self._device)
        ops.restore_blocks(memory, memory[:0], where[0], where[1], where[2], self.decoder.cos_sin, self.kv.pages)

    def _batch(
        self,
        tokens: Sequence[NDArray[np.int32]],
        positions: Sequence[NDArray[np.int64]],
        slots: Sequence[NDArray[np.int64]],
        tables: Sequence[Sequence[int]],
    ) -> ForwardBatch:
        """Rows of several sequences that want no logits."""
        packed = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
        for i, table in enumerate(tables):
            packed[i, : len(table)] = table
        starts = np.concatenate([[0], np.cumsum([len(each) for each in tokens])])

        def int32(values: NDArray[np.int64] | list[int]) -> torch.Tensor:
            return torch.from_numpy(np.asarray(values, dtype=np.int32)).to(self._device)

        return ForwardBatch(
            tokens=torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(self._device),
            positions=int32(np.concatenate(positions)),
            slots=int32(np.concatenate(slots)),
            block_tables=torch.from_numpy(packed).to(self._device),
            kv_slots=int32([len(table) * self.block_size for table in tables]),
            query_starts=int32(starts),
            logit_rows=self._none,
        )

    def _tensor(self, values: Sequence[int] | NDArray[np.int64] | NDArray[np.int32]) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=self._device)


def _bytes(pages: torch.Tensor, shape: Sequence[int], block_size: int) -> NDArray[np.uint8]:
    """[n, L, 2, Hkv, B, bytes] of pages of any type."""
    content: NDArray[np.uint8] = pages.view(torch.uint8).reshape(len(pages), *shape, block_size, -1).numpy()
    return content


def _slots(blocks: Sequence[int], places: NDArray[np.int64] | NDArray[np.int32], block_size: int) -> NDArray[np.int64]:
    """Slots in memory of places in a run of blocks."""
    if not len(places):
        return np.empty(0, dtype=np.int64)
    numbers, offsets = np.divmod(places, block_size)
    slots: NDArray[np.int64] = np.asarray(blocks, dtype=np.int64)[numbers] * block_size + offsets
    return slots
