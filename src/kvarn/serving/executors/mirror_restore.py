"""Mirrors from host memory into the pool, layer by layer: what they share is read, and sent to a device, once for all.

In: views of members of one family, and for each of its blocks where it goes. Out: their pages, written. On the CPU the
arrays are read where they are. To a CUDA device a layer travels in page-locked memory while the one before it is
restored: two buffers on each side take turns.

Source: TokenDance's restore (arXiv:2604.03143, section 4.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvarn.kernels import ops
from kvarn.serving.kvcache.mirrors import MirrorView


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the blocks of a member go."""

    view: MirrorView
    starts: Sequence[int]
    """Of each block: the position that its first key is turned to; negative: its keys are turned already."""
    targets: Sequence[int]
    """Of each block: the block of the pool; negative: it is not wanted."""


def restore_mirrors(placements: Sequence[Placement], cos_sin: Tensor, pages: Tensor, dtype: torch.dtype) -> None:
    """Write members' blocks into `pages` [N, L, 2, Hkv, B, D], or int8 pages, as `ops.restore_blocks` does.

    `dtype` is what the arrays hold. On a CUDA device the work may be under way when this returns, in the order of the
    current stream. ValueError when the views are not all of one family.
    """
    if not placements:
        return
    master = placements[0].view.master
    if any(placement.view.master is not master for placement in placements):
        raise ValueError("views of several families: restore one family after another")
    wanted = [np.asarray(placement.targets) >= 0 for placement in placements]

    def joined(lists: list[Sequence[int]]) -> Tensor:
        parts = [np.asarray(part, dtype=np.int32)[keep] for part, keep in zip(lists, wanted, strict=True)]
        return torch.from_numpy(np.concatenate(parts)).to(pages.device)

    starts = joined([placement.starts for placement in placements])
    targets = joined([placement.targets for placement in placements])
    layers = _Layers([placement.view for placement in placements], wanted, dtype)
    if pages.device.type == "cuda":
        _restore_through_buffers(layers, starts, targets, cos_sin, pages)
        return
    buffer = torch.empty(layers.most_patches, *master.shape[2:], dtype=dtype)
    for i in range(layers.count):
        shared, patches = layers.master[:, i : i + 1], layers.patches(i, buffer)[:, None]
        ops.restore_blocks(shared, patches, layers.sources[i], starts, targets, cos_sin, pages[:, i : i + 1])


class _Layers:
    """What the members have in each layer, all members' patches of a layer numbered together."""

    def __init__(self, views: Sequence[MirrorView], wanted: Sequence[np.ndarray], dtype: torch.dtype) -> None:
        self.master = torch.from_numpy(views[0].master).view(dtype)
        self.count = self.master.shape[1]
        self._patches = [torch.from_numpy(view.patches).view(dtype) for view in views]
        # Patches of a layer lie together: of each view, where those of each layer end.
        ends = np.array([(view.sources < 0).sum(1).cumsum() for view in views])  # [views, L]
        self._ends = np.concatenate([np.zeros_like(ends[:, :1]), ends], axis=1)
        before = np.diff(self._ends, axis=1).cumsum(0) - np.diff(self._ends, axis=1)  # other views' in the same layer
        shifts = before - self._ends[:, :-1]
        sources = [
            np.where(view.sources < 0, view.sources - shift[:, None], view.sources)[:, keep]
            for view, shift, keep in zip(views, shifts, wanted, strict=True)
        ]
        self.sources = torch.from_numpy(np.concatenate(sources, axis=1).astype(np.int32, order="C"))
        """[L, J]"""

    @property
    def most_patches(self) -> int:
        return int(np.diff(self._ends, axis=1).sum(0).max())

    def patches(self, layer: int, buffer: Tensor) -> Tensor:
        """Fill the leading elements of `buffer` with a layer's patches; those: [some, 2, Hkv, B, D]."""
        parts = [part[ends[layer] : ends[layer + 1]] for part, ends in zip(self._patches, self._ends, strict=True)]
        filled = buffer[: sum(len(part) for part in parts)]
        return torch.cat(parts, out=filled)


def _restore_through_buffers(layers: _Layers, starts: Tensor, targets: Tensor, cos_sin: Tensor, pages: Tensor) -> None:
    shared = len(layers.master)
    shape = (shared + layers.most_patches, 1, *layers.master.shape[2:])
    host = [torch.empty(shape, dtype=layers.master.dtype, pin_memory=True) for _ in range(2)]
    device = [torch.empty(shape, dtype=layers.master.dtype, device=pages.device) for _ in range(2)]
    sources = layers.sources.to(pages.device)
    compute, copies = torch.cuda.current_stream(pages.device), torch.cuda.Stream(pages.device)  # type: ignore[no-untyped-call]
    copies.wait_stream(compute)
    sent, restored = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))  # type: ignore[no-untyped-call]
    for i in range(layers.count):
        turn = i % 2
        sent[turn].synchronize()  # the layer before the last has left this buffer
        host[turn][:shared, 0].copy_(layers.master[:, i])
        filled = shared + len(layers.patches(i, host[turn][shared:, 0]))
        with torch.cuda.stream(copies):
            copies.wait_event(restored[turn])
            device[turn][:filled].copy_(host[turn][:filled], non_blocking=True)
            sent[turn].record(copies)
        compute.wait_event(sent[turn])
        ops.restore_blocks(
            device[turn][:shared], device[turn][shared:filled], sources[i], starts, targets, cos_sin,
            pages[:, i : i + 1],
        )  # fmt: skip
        restored[turn].record(compute)
    # The allocator gives buffers to others by the order of the stream they are from: all are used by both.
    for buffer in device:
        buffer.record_stream(copies)
