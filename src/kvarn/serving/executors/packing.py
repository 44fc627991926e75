"""Turns a batch into the tensors of one forward pass: arithmetic on whole arrays, in memory allocated once.

What follows from who is in the batch with how many rows (the layout) is worked out when that changes; from step to
step of a decode only positions, slots and tokens move on. A request's blocks are copied when it gets them.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.models.spec import ForwardBatch, SharedViews
from kvarn.serving.batch import Batch
from kvarn.serving.executors.shared_views import pack_views
from kvarn.serving.request import Request


class Packer:
    """Packs batches of up to `max_rows` tokens of `max_requests` requests.

    On a CPU the tensors of a batch are views of this object's memory: the next `pack` overwrites them.
    """

    def __init__(
        self, *, max_rows: int, max_requests: int, max_context: int, block_size: int, device: torch.device
    ) -> None:
        self._block_size = block_size
        self._device = device
        self._tokens = np.zeros(max_rows, dtype=np.int64)
        self._positions = np.zeros(max_rows, dtype=np.int32)
        self._slots = np.zeros(max_rows, dtype=np.int32)
        self._kv_slots = np.zeros(max_requests, dtype=np.int32)
        self._query_starts = np.zeros(max_requests + 1, dtype=np.int32)
        self._logit_rows = np.zeros(max_rows, dtype=np.int64)
        self._tables = np.zeros((max_requests, -(-max_context // block_size)), dtype=np.int32)
        self._packed_tables = np.zeros(self._tables.size, dtype=np.int32)
        self._known_blocks = np.zeros(max_requests, dtype=np.int64)
        """Blocks of each table that are right."""
        self._layout: tuple[list[Request], list[int], list[int], list[int]] = ([], [], [], [])
        self._sequence_of_row: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._offset_in_chunk: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._num_logits = 0
        self._width = 0
        self._forward: ForwardBatch | None = None
        self._laid_out: list[int] = []
        """Places in the batch of requests with a layout."""
        self._views: SharedViews | None = None
        self._views_hold = True
        """Whether they are right wherever the rows of this layout stand."""

    def pack(self, batch: Batch) -> ForwardBatch:
        """Tensors of the batch. A row that samples wants logits for its last token and each draft before it."""
        self._lay_out(batch)
        requests, counts = self._layout[0], self._counts
        starts = np.array([request.num_computed for request in requests])
        ends = starts + counts
        self._update_tables(requests, ends)
        rows = len(self._sequence_of_row)
        positions = self._positions[:rows]
        positions[:] = starts[self._sequence_of_row] + self._offset_in_chunk
        own_slots: NDArray[np.int32] = positions
        self._kv_slots[: len(requests)] = ends
        if self._laid_out:
            own_slots = self._place(requests, starts, ends)
            if not self._views_hold:
                self._views, self._views_hold = pack_views(requests, self._query_starts, positions, self._block_size)
                self._forward = None
        blocks, offsets = np.divmod(own_slots, self._block_size)
        self._slots[:rows] = self._tables[self._sequence_of_row, blocks] * self._block_size + offsets
        if self._laid_out:
            self._tokens[:rows] = _tokens_at(requests, positions, self._query_starts)
        elif rows == len(requests):
            self._tokens[:rows] = [request.tokens[request.num_computed] for request in requests]
        else:
            chunks = zip(requests, starts.tolist(), ends.tolist(), strict=True)
            np.concatenate([request.tokens[start:end] for request, start, end in chunks], out=self._tokens[:rows])
        if self._forward is None or self._device.type != "cpu":
            self._forward = self._tensors(rows, len(requests))
        return self._forward

    def _place(self, requests: list[Request], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int32]:
        """Correct positions, and slots that may be looked at, of requests with a layout; the own slots of all rows."""
        own_slots = self._positions[: len(self._sequence_of_row)].copy()
        for i in self._laid_out:
            layout = requests[i].layout
            assert layout is not None
            rows = slice(self._query_starts[i], self._query_starts[i + 1])
            positions = layout.positions(int(starts[i]), int(ends[i]))
            self._positions[rows] = positions
            own_slots[rows] = layout.own_slots(positions)
            self._kv_slots[i] = layout.slots_in_use(int(ends[i]))
        return own_slots

    def _lay_out(self, batch: Batch) -> None:
        """Work out what follows from requests and counts, unless all of it is as in the last step."""
        requests = [row.request for row in batch.rows]
        # A request that was preempted in between has other blocks now, though it may be at the same token.
        stays = [request.preemptions for request in requests]
        counts = [row.count for row in batch.rows]
        logits = [row.drafts + 1 if row.samples else 0 for row in batch.rows]
        layout = (requests, stays, counts, logits)
        if layout == self._layout:
            return
        if layout[:2] != self._layout[:2]:
            self._known_blocks[:] = 0
            self._width = 0
        self._layout, self._forward = layout, None
        self._laid_out = [i for i, request in enumerate(requests) if request.layout is not None]
        self._counts = np.array(counts)
        ends = np.cumsum(self._counts)
        self._query_starts[1 : len(counts) + 1] = ends
        self._sequence_of_row = np.repeat(np.arange(len(counts)), counts)
        self._offset_in_chunk = np.arange(int(ends[-1])) - self._query_starts[self._sequence_of_row]
        # Of each chunk, the rows whose distance to its end is at most the logits wanted.
        wanted = (self._counts - np.array(logits))[self._sequence_of_row] <= self._offset_in_chunk
        rows = np.flatnonzero(wanted)
        self._num_logits = len(rows)
        self._logit_rows[: len(rows)] = rows
        self._views, self._views_hold = None, not self._laid_out

    def _update_tables(self, requests: list[Request], ends: NDArray[np.int64]) -> None:
        """Copy the blocks that the tables do not have yet."""
        known = self._known_blocks[: len(requests)]
        slots = ends
        if self._laid_out:
            used = [
                each.layout.slots_in_use(int(end)) if each.layout else end
                for each, end in zip(requests, ends, strict=True)
            ]
            slots = np.array(used)
        blocks: NDArray[np.int64] = (slots + self._block_size - 1) // self._block_size
        grown = np.flatnonzero(blocks > known).tolist()
        if not grown:
            return
        for i in grown:
            self._tables[i, known[i] : blocks[i]] = requests[i].block_table[known[i] : blocks[i]]
        known[grown] = blocks[grown]
        width = int(known.max())
        if width != self._width:
            self._width, self._forward = width, None
        np.copyto(self._table_view(len(requests)), self._tables[: len(requests), :width])

    def _table_view(self, num_requests: int) -> NDArray[np.int32]:
        return self._packed_tables[: num_requests * self._width].reshape(num_requests, self._width)

    def _tensors(self, rows: int, num_requests: int) -> ForwardBatch:
        return ForwardBatch(
            tokens=self._tensor(self._tokens[:rows]),
            positions=self._tensor(self._positions[:rows]),
            slots=self._tensor(self._slots[:rows]),
            block_tables=self._tensor(self._table_view(num_requests)),
            kv_slots=self._tensor(self._kv_slots[:num_requests]),
            query_starts=self._tensor(self._query_starts[: num_requests + 1]),
            logit_rows=self._tensor(self._logit_rows[: self._num_logits]),
            views=self._views,
        )

    def _tensor(self, array: NDArray[np.int32] | NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


def _tokens_at(
    requests: list[Request], positions: NDArray[np.int32], query_starts: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Tokens of rows at any positions."""
    parts = [request.tokens[positions[query_starts[i] : query_starts[i + 1]]] for i, request in enumerate(requests)]
    return np.concatenate(parts)
