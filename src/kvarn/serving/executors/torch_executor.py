"""Computes batches with torch: packs a batch into tensors, runs the decoder, samples.

Owns the KV memory and the sampler's state.
"""

from __future__ import annotations

import math
from time import perf_counter

import torch

from kvarn.errors import CapacityError
from kvarn.kernels import flashinfer, ops
from kvarn.models.spec import Decoder, ForwardBatch, KVMemory, ModelSpec
from kvarn.serving.batch import Batch, SampledToken
from kvarn.serving.executors.cuda_graphs import CudaGraphs, DeviceForward, spare_blocks
from kvarn.serving.executors.host_memory import host_pages
from kvarn.serving.executors.packing import Packer
from kvarn.serving.request import Request
from kvarn.serving.sampling.sampler import Sampler
from kvarn.serving.sampling.verify import sample_rows


def allocate_kv(
    spec: ModelSpec, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype | None = None
) -> KVMemory:
    """KV memory for `num_blocks` blocks and the spare ones; CapacityError when the device cannot hold it.

    `dtype` of keys and values: the model's, the default, or torch.int8.
    """
    num_blocks += spare_blocks(block_size, device)
    block, element = spec.kv_block(block_size, dtype or spec.dtype)
    try:
        shape = (num_blocks, *block)
        on_host = device.type == "cpu"
        pages = host_pages(shape, element) if on_host else torch.zeros(shape, dtype=element, device=device)
    except (RuntimeError, MemoryError, OSError) as error:
        wanted = num_blocks * math.prod(block) * element.itemsize / 2**20
        raise CapacityError(f"cannot allocate {wanted:.0f} MiB for the KV pool: lower --kv-memory ({error})") from error
    positions = torch.full((num_blocks, block_size), -1, dtype=torch.int32, device=device)
    return KVMemory(pages, positions)


class TorchExecutor:
    """Executor over a torch Decoder. See kvarn.serving.executors.protocol.

    `kv` comes from `allocate_kv`. With `cuda_graphs`, a CUDA device replays decode steps where the decoder allows it;
    with `use_flashinfer`, other steps attend with FlashInfer where it is installed.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: KVMemory,
        sampler: Sampler,
        *,
        max_rows: int,
        max_requests: int,
        max_context: int,
        cuda_graphs: bool = True,
        use_flashinfer: bool = True,
    ) -> None:
        self.decoder = decoder
        self.kv = kv
        self.sampler = sampler
        self.block_size = kv.slot_positions.shape[1]
        self._flat_positions = kv.slot_positions.view(-1)
        self.forward_seconds = 0.0
        device = kv.pages.device
        limits = {"max_rows": max_rows, "max_requests": max_requests, "max_context": max_context}
        self._spare_blocks = spare_blocks(self.block_size, device)
        self._forward = self._forward_at_once
        if device.type == "cuda":
            # The reference kernels, which run where there is no Triton, wait for the device.
            capture = CudaGraphs() if cuda_graphs and decoder.capturable and ops.has_triton() else None
            plans = use_flashinfer and ops.has_triton() and flashinfer.is_installed(device)
            launcher = DeviceForward(
                decoder, kv, **limits, num_spare_blocks=self._spare_blocks, capture=capture,
                planned_attention=flashinfer.PlannedAttention(device) if plans else None,
            )  # fmt: skip
            self._forward = launcher.run
            device = torch.device("cpu")  # the launcher sends a batch to its device
        self._packer = Packer(**limits, block_size=self.block_size, device=device)

    @property
    def num_blocks(self) -> int:
        return int(self.kv.pages.shape[0]) - self._spare_blocks

    def add(self, request: Request) -> None:
        self.sampler.add(request)

    def remove(self, request: Request) -> None:
        self.sampler.remove(request)

    @torch.inference_mode()
    def execute(self, batch: Batch) -> list[list[SampledToken]]:
        forward = self._packer.pack(batch)
        started = perf_counter()
        logits = self._forward(forward)
        self.forward_seconds += perf_counter() - started
        sampling = [row for row in batch.rows if row.samples]
        return sample_rows(self.sampler, logits, sampling) if sampling else []

    def _forward_at_once(self, batch: ForwardBatch) -> torch.Tensor:
        self._flat_positions[batch.slots] = batch.positions
        return self.decoder.forward(batch, self.kv)
