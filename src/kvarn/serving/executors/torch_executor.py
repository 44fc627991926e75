"""Computes batches with torch: packs a batch into tensors, runs the decoder, samples.

Owns the KV memory and the sampler's state.
"""

from __future__ import annotations

from time import perf_counter

import torch

from kvarn.errors import CapacityError
from kvarn.models.spec import Decoder, KVMemory, ModelSpec
from kvarn.serving.batch import Batch, SampledToken
from kvarn.serving.executors.packing import Packer
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
        self.forward_seconds = 0.0
        self._packer = Packer(
            max_rows=max_rows,
            max_requests=max_requests,
            max_context=max_context,
            block_size=self.block_size,
            device=kv.pages.device,
        )

    @property
    def num_blocks(self) -> int:
        return int(self.kv.pages.shape[0])

    def add(self, request: Request) -> None:
        self.sampler.add(request)

    def remove(self, request: Request) -> None:
        self.sampler.remove(request)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[SampledToken]:
        forward = self._packer.pack(batch)
        self._flat_positions[forward.slots] = forward.positions
        started = perf_counter()
        logits = self.decoder.forward(forward, self.kv)
        self.forward_seconds += perf_counter() - started
        sampling = [row.request for row in batch.rows if row.samples]
        return self.sampler.sample(logits, sampling) if sampling else []
