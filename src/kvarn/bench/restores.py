"""Restoring mirrors into the pool, dense beside fused: a shape and a number of mirrors in, milliseconds out.

N mirrors of one master of 40 blocks, each with 3 blocks of its own in place of the master's, go to pages of their own,
turned to places of their own. *dense* does it mirror by mirror: copies the master into a buffer (one for all mirrors,
laid out as the next step reads it), overwrites the blocks that differ, and turns and writes each layer of the buffer
with the engine's own `rope_and_cache`. *materialised* copies into a buffer of whole blocks and lets `restore_blocks`
turn and write those: against it, fused gains nothing from a better kernel. *fused* is one `restore_blocks` for all.
Ways are timed in turn; medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvarn.kernels import ops

SHARED, OWN, MIRRORS = 40, 3, (2, 4, 6, 8, 10)


@dataclass(frozen=True)
class Shape:
    """Of a model's keys and values."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    block_size: int = 16


SHAPES = (Shape("SmolLM2-135M", 30, 3, 64), Shape("7B (28 layers, 4 kv heads of 128)", 28, 4, 128))


@dataclass(frozen=True)
class Row:
    """Milliseconds for all mirrors together, and how often fused is faster."""

    shape: str
    mirrors: int
    written_mib: float
    dense_ms: float
    materialised_ms: float
    fused_ms: float
    over_dense: float
    over_materialised: float


class Restores:
    """Arguments of both ways for `mirrors` mirrors."""

    def __init__(self, shape: Shape, mirrors: int) -> None:
        size, tokens = shape.block_size, SHARED * shape.block_size
        block = (shape.layers, 2, shape.kv_heads, size, shape.head_dim)
        self.mirrors, self.size = mirrors, size
        self.master = torch.randn(SHARED, *block).bfloat16()
        self.diffs = torch.randn(mirrors * OWN, *block).bfloat16()
        self.pages = torch.zeros(mirrors * SHARED, *block, dtype=torch.bfloat16)
        self.cos_sin = torch.randn(tokens + 100 * mirrors, shape.head_dim)
        own = torch.stack([torch.randperm(SHARED)[:OWN] for _ in range(mirrors)])
        self.own = own.tolist()
        self.targets = torch.randperm(mirrors * SHARED).int().view(mirrors, SHARED)
        first = 100 * torch.arange(mirrors)[:, None]
        starts = first + size * torch.arange(SHARED)
        self.sources = torch.arange(SHARED).repeat(mirrors, 1)
        self.sources.scatter_(1, own, ~torch.arange(mirrors * OWN).view(mirrors, OWN))
        self.jobs = (self.sources.int().flatten(), starts.int().flatten(), self.targets.flatten())
        self.positions = (first + torch.arange(tokens)).int()
        self.slots = (self.targets.long()[:, :, None] * size + torch.arange(size)).int().flatten(1)
        # Tokens of a head one after another, as rows of `rope_and_cache`; blocks lie in it as a view.
        self.buffer = torch.zeros(shape.layers, 2, shape.kv_heads, tokens, shape.head_dim, dtype=torch.bfloat16)
        # Blocks as they are stored, and each restored from its own place.
        self.copy, self.none = torch.zeros_like(self.master), self.diffs[:0]
        self.alone = (torch.arange(SHARED).int().repeat(mirrors, 1), starts.int(), self.targets)
        self.no_query = torch.zeros(tokens, 0, shape.head_dim, dtype=torch.bfloat16)

    def dense(self) -> None:
        blocks = self._blocks(self.buffer)
        for mirror in range(self.mirrors):
            blocks.copy_(self.master)
            for place, diff in zip(self.own[mirror], self._diffs(mirror), strict=True):
                blocks[place].copy_(diff)
            for layer in range(len(self.buffer)):
                self._write(mirror, layer, self.buffer[layer])

    def materialised(self) -> None:
        for mirror in range(self.mirrors):
            self.copy.copy_(self.master)
            for place, diff in zip(self.own[mirror], self._diffs(mirror), strict=True):
                self.copy[place].copy_(diff)
            sources, starts, targets = (jobs[mirror] for jobs in self.alone)
            ops.restore_blocks(self.copy, self.none, sources, starts, targets, self.cos_sin, self.pages)

    def fused(self) -> None:
        ops.restore_blocks(self.master, self.diffs, *self.jobs, self.cos_sin, self.pages)

    def _diffs(self, mirror: int) -> Tensor:
        return self.diffs[mirror * OWN : (mirror + 1) * OWN]

    def _blocks(self, buffer: Tensor) -> Tensor:
        """[blocks, layers, 2, kv_heads, size, dim]"""
        layers, planes, heads, _, dim = buffer.shape
        return buffer.view(layers, planes, heads, SHARED, self.size, dim).permute(3, 0, 1, 2, 4, 5)

    def _write(self, mirror: int, layer: int, rows: Tensor) -> None:
        key, value = rows.transpose(1, 2)
        ops.rope_and_cache(
            self.no_query, key, value, self.cos_sin, self.positions[mirror], self.pages[:, layer], self.slots[mirror]
        )


def measured(shape: Shape, mirrors: int, repeats: int) -> Row:
    """Medians of `repeats` rounds, after all ways gave the same bytes."""
    case = Restores(shape, mirrors)
    ways: list[Callable[[], None]] = [case.dense, case.materialised, case.fused]
    results = []
    for way in ways:
        case.pages.zero_()
        way()
        results.append(case.pages.clone())
    if not all(torch.equal(result, results[0]) for result in results):
        raise AssertionError(f"{shape.name}: the ways of restoring {mirrors} mirrors differ")
    del results
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, taken in zip(ways, times, strict=True):
            started = time.perf_counter()
            way()
            taken.append(time.perf_counter() - started)
    dense, materialised, fused = (1e3 * statistics.median(taken) for taken in times)
    written = case.pages.numel() * case.pages.itemsize / 2**20
    return Row(shape.name, mirrors, written, dense, materialised, fused, dense / fused, materialised / fused)
