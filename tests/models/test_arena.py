"""Weights kept side by side: the same values, whatever their size, for as long as anybody holds them."""

from __future__ import annotations

import gc

import torch

from kvarn.models.arena import Arena


def test_kept_tensors_are_equal_apart_and_outlive_the_arena() -> None:
    arena = Arena()
    tensors = [torch.randn(n, 3) for n in (1, 7, 1000)] + [torch.randn(5).bfloat16(), torch.ones(9_000_000)]
    kept = [arena.keep(tensor) for tensor in tensors]
    del arena
    gc.collect()
    kept[0].add_(1)
    assert torch.equal(kept[0], tensors[0] + 1)
    for copy, tensor in zip(kept[1:], tensors[1:], strict=True):
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor)
        assert copy.is_contiguous() and copy.data_ptr() % 64 == 0
