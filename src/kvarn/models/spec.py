"""What the rest of kvarn knows about a loaded model: its shape, what goes into one forward pass and what comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a causal language model. Sizes in elements unless named otherwise."""

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int
    """Tokens of prompt + output the model was made for."""
    eos_tokens: frozenset[int]
    dtype: torch.dtype
    """Of activations, and of the KV cache unless that is quantised."""
    precision: str
    """Of the weights: "float32", "bfloat16", "int8" or "int4"."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Of a KV cache that is not quantised."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def kv_block(self, block_size: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and element type of one block of KV memory that holds keys and values as `dtype`; see KVMemory."""
        heads = (self.num_layers, 2, self.num_kv_heads)
        if dtype == torch.int8:
            return (*heads, block_size * (self.head_dim + 4)), torch.uint8
        return (*heads, block_size, self.head_dim), dtype


@dataclass(slots=True)
class KVMemory:
    """The KV pool's memory on one device, page-major: all layers' K and V of one block are contiguous.

    pages           [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], or of an int8 cache
                    [num_blocks, num_layers, 2, num_kv_heads, block_size * (head_dim + 4)] uint8: int8 rows, then a
                    float32 scale for each
    slot_positions  [num_blocks, block_size] int32: position of the token in each slot
    """

    pages: torch.Tensor
    slot_positions: torch.Tensor

    def layer(self, index: int) -> torch.Tensor:
        """[num_blocks, 2, num_kv_heads, ...], a view: what kernels/ops.py calls `kv`."""
        return self.pages[:, index]

    def place(self, blocks: list[int], starts: list[int]) -> None:
        """Blocks have got content from elsewhere: block `blocks[i]` holds the tokens from position `starts[i]` on."""
        positions = self.slot_positions
        rows = torch.tensor(starts, dtype=torch.int32)[:, None] + torch.arange(positions.shape[1], dtype=torch.int32)
        positions[torch.tensor(blocks, dtype=torch.int64, device=positions.device)] = rows.to(positions.device)


@dataclass(slots=True)
class SharedViews:
    """KV that several sequences of a batch read where it lies, each at positions of its own.

    A view is a run of blocks and the batch rows that look at it, beside what their sequences' block tables give them.
    For a row of shift d, the token in a slot of position q stands at q + d: see `kvarn.kernels.ops.shared_attention`.
    """

    block_tables: torch.Tensor
    """[V, W] int32"""
    kv_slots: torch.Tensor
    """[V] int32"""
    row_starts: torch.Tensor
    """[V + 1] int32: entries row_starts[v]:row_starts[v + 1] of `rows` and `shifts` look at view v"""
    rows: torch.Tensor
    """[U] int32: rows of the batch"""
    shifts: torch.Tensor
    """[U] int32"""

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """In the order in which `shared_attention` takes them."""
        return self.block_tables, self.kv_slots, self.row_starts, self.rows, self.shifts


@dataclass(slots=True)
class ForwardBatch:
    """Tensors of one forward pass over T rows of S sequences; R of the rows want logits. See kernels/ops.py."""

    tokens: torch.Tensor
    """[T] int64"""
    positions: torch.Tensor
    """[T] int32"""
    slots: torch.Tensor
    """[T] int32: where each row's K and V go: block * block_size + offset."""
    block_tables: torch.Tensor
    """[S, M] int32"""
    kv_slots: torch.Tensor
    """[S] int32"""
    query_starts: torch.Tensor
    """[S + 1] int32"""
    logit_rows: torch.Tensor
    """[R] int64"""
    views: SharedViews | None = None


class Decoder(Protocol):
    """A causal language model over paged KV memory."""

    spec: ModelSpec
    capturable: bool
    """Whether what `forward` launches on a CUDA device depends on shapes alone, so that it can be a CUDA graph."""
    shares_views: bool
    """Whether `forward` takes batches with views."""

    def forward(self, batch: ForwardBatch, kv: KVMemory) -> torch.Tensor:
        """Write the K and V of every row into `kv` and return logits [R, vocab_size] (any float dtype).

        The caller has already written `kv.slot_positions` for the batch's slots.
        """
        ...
