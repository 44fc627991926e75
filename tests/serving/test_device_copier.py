"""The memory behind copies to a CUDA device; the copies themselves are in tests/gpu/test_device_copier.py."""

from __future__ import annotations

from kvarn.serving.executors.device_copier import PinnedSlab


def test_rows_are_their_own_memory_and_taken_in_chunks_when_first_asked_for():
    slab = PinnedSlab(10, 16, chunk_bytes=64, pinned=False)
    assert len(slab._chunks) == 0
    for i in (9, 0, 5, 4):
        slab.row(i).fill_(i)
    assert len(slab._chunks) == 3
    assert all((slab.row(i) == i).all() and slab.row(i).shape == (16,) for i in (9, 0, 5, 4))
    assert sum(chunk.shape[0] for chunk in slab._chunks.values()) == 4 + 4 + 2
