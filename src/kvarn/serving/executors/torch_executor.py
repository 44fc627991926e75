"""Computes batches with torch: packs a batch into tensors, runs the decoder, samples.

Owns the KV memory and the sampler's state. Everything a step needs on the device is written into numpy
buffers that are allocated once, then handed over as one view each.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np
import torch

from kvarn.errors import CapacityError
from kvarn.models.spec import Decoder, ForwardBatch, KVMemory, ModelSpec
from kvarn.serving.batch import Batch, SampledToken
from kvarn.serving.request import Request
from kvarn.serving.sampling.sampler import Sampler


def allocate_kv(spec: ModelSpec, num_blocks: int, block_size: int, device: torch.device) -> KVMemory:
    """KV memory for `num_blocks` blocks; CapacityError when the device cannot hold it."""
    shape = (num_blocks, spec.num_layers, 2, spec.num_kv_heads, block_size, spec.head_dim)
    try:
        pages = torch.empty(shape, dtype=spec.dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        wanted = num_blocks * block_size * spec.kv_bytes_per_token / 2**20
        raise CapacityError(f"cannot allocate {wanted:.0f} MiB for the KV pool: lower --kv-memory ({error})") from error
    positions = torch.full((num_blocks, block_size), -1, dtype=torch.int32, device=device)
    return KVMemory(pages, positions)


class TorchExecutor:
    """Executor over a torch Decoder. See kvarn.serving.executors.protocol."""

    def __init__(
        self, decoder: Decoder, kv: KVMemory, sampler: Sampler, *, max_rows: int, max_requests: int, max_context: int
    ) -> None:
        self.decoder = decoder
        self.kv = kv
        self.sampler = sampler
        self.block_size = kv.slot_positions.shape[1]
        self._flat_positions = kv.slot_positions.view(-1)
        self._device = kv.pages.device
        self.forward_seconds = 0.0
        blocks_per_request = -(-max_context // self.block_size)
        self._buffers = _Buffers(max_rows, max_requests, blocks_per_request)

    @property
    def num_blocks(self) -> int:
        return int(self.kv.pages.shape[0])

    def add(self, request: Request) -> None:
        self.sampler.add(request)

    def remove(self, request: Request) -> None:
        self.sampler.remove(request)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[SampledToken]:
        forward, sampling = self._pack(batch)
        self._flat_positions[forward.slots] = forward.positions
        started = perf_counter()
        logits = self.decoder.forward(forward, self.kv)
        self.forward_seconds += perf_counter() - started
        return self.sampler.sample(logits, sampling) if sampling else []

    def _pack(self, batch: Batch) -> tuple[ForwardBatch, list[Request]]:
        """Tensors of the batch, and the requests that sample, in order of their logits."""
        buffers, size = self._buffers, self.block_size
        sampling: list[Request] = []
        requests = len(batch.rows)
        width = max(-(-(row.request.num_computed + row.count) // size) for row in batch.rows)
        block_tables = buffers.block_tables[: requests * width].reshape(requests, width)
        row = 0
        for i, scheduled in enumerate(batch.rows):
            request, count = scheduled.request, scheduled.count
            start = request.num_computed
            end = row + count
            if count == 1:
                buffers.tokens[row] = request.tokens[start]
                buffers.positions[row] = start
                buffers.slots[row] = request.block_table[start // size] * size + start % size
            else:
                buffers.tokens[row:end] = request.tokens[start : start + count]
                positions = np.arange(start, start + count, dtype=np.int32)
                buffers.positions[row:end] = positions
                buffers.slots[row:end] = request.block_table[positions // size] * size + positions % size
            blocks = -(-(start + count) // size)
            block_tables[i, :blocks] = request.block_table[:blocks]
            buffers.kv_slots[i] = start + count
            buffers.query_starts[i + 1] = end
            if scheduled.samples:
                buffers.logit_rows[len(sampling)] = end - 1
                sampling.append(request)
            row = end
        forward = ForwardBatch(
            tokens=self._tensor(buffers.tokens[:row]),
            positions=self._tensor(buffers.positions[:row]),
            slots=self._tensor(buffers.slots[:row]),
            block_tables=self._tensor(block_tables),
            kv_slots=self._tensor(buffers.kv_slots[:requests]),
            query_starts=self._tensor(buffers.query_starts[: requests + 1]),
            logit_rows=self._tensor(buffers.logit_rows[: len(sampling)]),
        )
        return forward, sampling

    def _tensor(self, array: np.ndarray[tuple[int, ...], np.dtype[np.int32 | np.int64]]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)


class _Buffers:
    """Host memory of one step's metadata, sized for the largest step."""

    def __init__(self, max_rows: int, max_requests: int, blocks_per_request: int) -> None:
        self.tokens = np.zeros(max_rows, dtype=np.int64)
        self.positions = np.zeros(max_rows, dtype=np.int32)
        self.slots = np.zeros(max_rows, dtype=np.int32)
        self.block_tables = np.zeros(max_requests * blocks_per_request, dtype=np.int32)
        self.kv_slots = np.zeros(max_requests, dtype=np.int32)
        self.query_starts = np.zeros(max_requests + 1, dtype=np.int32)
        self.logit_rows = np.zeros(max_requests, dtype=np.int64)
