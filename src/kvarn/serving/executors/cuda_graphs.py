"""The forward pass on a CUDA device: metadata in one asynchronous copy, and decode steps replayed from CUDA graphs.

In: a ForwardBatch in host memory. Out: logits on the device, valid until the next step. A graph repeats the launches
of one batch size over the same memory, so the host pays for one launch instead of hundreds. Steps in which every
sequence has one row that wants logits (decode) are filled up to the next size that was captured; all others, and larger
ones, are launched as usual, where attention may be planned for each step (`kvarn.kernels.flashinfer`); those with
shared views are launched without a plan.

Rows that fill up a batch belong to sequences without slots: they look at nothing. Their keys and values go into spare
blocks behind those that the pool hands out, each into a slot of its own, so they never touch what a request owns.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Callable
from typing import Final

import torch

from kvarn.kernels.flashinfer import PagedRows, PlannedAttention
from kvarn.models.spec import Decoder, ForwardBatch, KVMemory, SharedViews
from kvarn.serving.executors.staging import Layout, Staging, copy_batch

_LARGEST: Final = 256
"""Rows of the largest graph: above, a step takes much longer than its launches."""
_STEP: Final = 8
_WARM_UPS: Final = 2

Work = Callable[[], None]
Capture = Callable[[Work], Work]


def graph_sizes(max_requests: int) -> list[int]:
    """Batch sizes that get a graph, ascending: 1, 2, 4, and multiples of 8 until one holds `max_requests`."""
    return [1, 2, 4, *range(_STEP, min(max_requests, _LARGEST) + _STEP, _STEP)]


def spare_blocks(block_size: int, device: torch.device) -> int:
    """Blocks that KV memory on `device` has beyond the pool's, for the rows that fill up a batch."""
    return -(-(_STEP - 1) // block_size) if device.type == "cuda" else 0


class CudaGraphs:
    """Makes CUDA graphs. They share their memory, so one runs after the other, on one stream."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Run `work` to warm up, record what it launches, and return what launches all of it again."""
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph.replay


class DeviceForward:
    """`decoder.forward` for batches in host memory.

    kv                       its last `num_spare_blocks` are nobody's; see `spare_blocks`
    max_rows, max_requests   rows and sequences of the largest batch
    max_context              tokens of the longest sequence
    capture                  `CudaGraphs()`, or None: no graphs. Decode steps are captured here, which takes seconds
    planned_attention        plans attention in steps without a graph, or None. It is tried out here, where it may
                             compile for minutes; if it fails, a warning says so and the decoder does without
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: KVMemory,
        *,
        max_rows: int,
        max_requests: int,
        max_context: int,
        num_spare_blocks: int,
        capture: Capture | None,
        planned_attention: PlannedAttention | None = None,
    ) -> None:
        self._decoder = decoder
        self._kv = kv
        self._flat_positions = kv.slot_positions.view(-1)
        num_blocks, block_size = kv.slot_positions.shape
        self._table_width = -(-max_context // block_size)
        self._first_spare_slot = (num_blocks - num_spare_blocks) * block_size
        self._sizes = graph_sizes(max_requests) if capture else []
        rows = max(max_rows, *self._sizes, 1)
        self._staging = Staging(Layout(rows, rows, self._table_width, rows).num_bytes, kv.slot_positions.device)
        self._logits = torch.empty(0)
        self._replays: dict[int, Work] = {}
        if capture:
            for size in reversed(self._sizes):  # the memory of the largest holds the others
                self._replays[size] = self._captured(size, capture)
        self._planned_attention = planned_attention
        if planned_attention is not None:
            self._try_planned_attention()

    @torch.inference_mode()
    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Notes the positions of the batch's slots, writes its keys and values, returns logits [R, vocab_size]."""
        rows = batch.tokens.shape[0]
        decodes = rows == batch.block_tables.shape[0] == batch.logit_rows.shape[0]
        if batch.views is None and decodes and self._sizes and rows <= self._sizes[-1]:
            size = self._sizes[bisect_left(self._sizes, rows)]
            self._send_filled(batch, size)
            self._replays[size]()
            return self._logits[:rows]
        layout = Layout.of(batch)
        copy_batch(batch, layout.views(self._staging.host_buffer()))
        self._staging.send(layout.num_bytes)
        views = layout.views(self._staging.device_buffer)
        if batch.views is not None:
            views.views = SharedViews(*(part.to(self._kv.pages.device) for part in batch.views.tensors()))
        if self._planned_attention is None or batch.views is not None:
            return self._compute(views)
        block_size = self._kv.slot_positions.shape[1]
        rows_of_step = PagedRows.of(batch.block_tables, batch.kv_slots, batch.query_starts, block_size)
        with self._planned_attention.step(rows_of_step):
            return self._compute(views)

    def _compute(self, batch: ForwardBatch) -> torch.Tensor:
        self._flat_positions[batch.slots] = batch.positions
        return self._decoder.forward(batch, self._kv)

    def _try_planned_attention(self) -> None:
        """Go through the decoder in spare blocks, once as a decode step does and once as a prompt does."""
        try:
            for rows in (1, 2):
                self.run(self._spare_batch(rows))
            if self._kv.pages.is_cuda:
                torch.cuda.synchronize(self._kv.pages.device)
        except Exception as error:  # from ImportError to bare RuntimeError, by what its compiler lacks
            self._planned_attention = None
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"FlashInfer is installed but does not run ({reason}), so attention stays with Triton; mend its "
                "installation, or set flashinfer=False in the engine's settings to silence this",
                stacklevel=2,
            )

    def _spare_batch(self, rows: int) -> ForwardBatch:
        """One sequence in the first spare slots, which wants no logits."""
        block_size = self._kv.slot_positions.shape[1]
        each = torch.arange(rows, dtype=torch.int32)
        blocks = torch.arange(-(-rows // block_size), dtype=torch.int32) + self._first_spare_slot // block_size
        ends = torch.tensor([0, rows], dtype=torch.int32)
        return ForwardBatch(
            each.long(), each, each + self._first_spare_slot, blocks[None], ends[1:], ends, each[:0].long()
        )

    def _step_layout(self, size: int) -> Layout:
        return Layout(size, size, self._table_width, size)

    def _send_filled(self, batch: ForwardBatch, size: int) -> None:
        """Send a batch of decode rows, filled up to `size` rows with sequences of one row and no slots."""
        layout = self._step_layout(size)
        host = layout.views(self._staging.host_buffer())
        copy_batch(batch, host)
        rows = batch.tokens.shape[0]
        host.tokens[rows:] = 0
        host.positions[rows:] = 0
        host.slots[rows:] = torch.arange(size - rows, dtype=torch.int32) + self._first_spare_slot
        host.kv_slots[rows:] = 0
        host.query_starts[rows:] = torch.arange(rows, size + 1, dtype=torch.int32)
        host.logit_rows[rows:] = torch.arange(rows, size)
        self._staging.send(layout.num_bytes)

    @torch.inference_mode()
    def _captured(self, size: int, capture: Capture) -> Work:
        # A batch that can be computed before there are requests: every row is of the first spare slot.
        rows = torch.arange(size + 1, dtype=torch.int32)
        nowhere = torch.zeros(size, dtype=torch.int32)
        spare = torch.full_like(nowhere, self._first_spare_slot)
        self._send_filled(
            ForwardBatch(nowhere.long(), nowhere, spare, nowhere[:, None], nowhere, rows, rows[:-1].long()), size
        )
        views = self._step_layout(size).views(self._staging.device_buffer)

        def work() -> None:
            logits = self._compute(views)
            if not len(self._logits):
                self._logits = torch.empty_like(logits)
            self._logits[:size].copy_(logits)

        return capture(work)
