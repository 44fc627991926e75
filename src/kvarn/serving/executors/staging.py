"""A step's metadata as one piece of memory: written on the host, sent to the device in one asynchronous copy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

import torch

from kvarn.models.spec import ForwardBatch

_ALIGNMENT: Final = 64
"""Bytes. Kernels are compiled anew for arguments that are aligned differently."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the tensors of a batch of a certain shape lie in a buffer, one after another."""

    rows: int
    sequences: int
    table_width: int
    logits: int

    @classmethod
    def of(cls, batch: ForwardBatch) -> Layout:
        sequences, table_width = batch.block_tables.shape
        return cls(batch.tokens.shape[0], sequences, table_width, batch.logit_rows.shape[0])

    def _parts(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            "tokens": (torch.int64, (self.rows,)),
            "positions": (torch.int32, (self.rows,)),
            "slots": (torch.int32, (self.rows,)),
            "block_tables": (torch.int32, (self.sequences, self.table_width)),
            "kv_slots": (torch.int32, (self.sequences,)),
            "query_starts": (torch.int32, (self.sequences + 1,)),
            "logit_rows": (torch.int64, (self.logits,)),
        }

    @property
    def num_bytes(self) -> int:
        return sum(_aligned_bytes(dtype, shape) for dtype, shape in self._parts().values())

    def views(self, buffer: torch.Tensor) -> ForwardBatch:
        """The batch that lies in `buffer` (uint8, at least `num_bytes`)."""
        tensors: dict[str, torch.Tensor] = {}
        start = 0
        for name, (dtype, shape) in self._parts().items():
            part = buffer[start : start + torch.Size(shape).numel() * dtype.itemsize]
            tensors[name] = part.view(dtype).view(shape)
            start += _aligned_bytes(dtype, shape)
        return ForwardBatch(**tensors, views=None)


def _aligned_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def copy_batch(source: ForwardBatch, target: ForwardBatch) -> None:
    """Copy all tensors of a batch but its shared views into the leading elements of larger ones."""
    for field in fields(ForwardBatch)[:-1]:
        tensor: torch.Tensor = getattr(source, field.name)
        getattr(target, field.name)[tuple(slice(length) for length in tensor.shape)].copy_(tensor)


class Staging:
    """A buffer on the device and two on the host, in page-locked memory for a CUDA device.

    The host writes into one while the other may still be on its way.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.device_buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._is_cuda = device.type == "cuda"
        self._host = [torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._is_cuda) for _ in range(2)]
        self._sent: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def host_buffer(self) -> torch.Tensor:
        """What to write the next step into; waits until the step before the last one has been sent."""
        event = self._sent[self._turn]
        if event is not None:
            event.synchronize()
        return self._host[self._turn]

    def send(self, num_bytes: int) -> None:
        """Copy the leading bytes to the device, in the order of its work."""
        self.device_buffer[:num_bytes].copy_(self._host[self._turn][:num_bytes], non_blocking=True)
        if self._is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._sent[self._turn] = event
        self._turn = 1 - self._turn
