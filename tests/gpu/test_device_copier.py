"""Copies between a CUDA device and host memory. What needs no device: tests/serving/test_device_copier.py."""

from __future__ import annotations

import pytest
import torch

from kvarn.models.spec import KVMemory
from kvarn.serving.executors.device_copier import DeviceCopier
from kvarn.serving.kvcache.copies import CopyJob, Direction
from tests.serving.test_host_copier import ended

pytestmark = pytest.mark.gpu

BLOCKS, SLOTS, SIZE = 64, 40, 8


def make() -> tuple[KVMemory, DeviceCopier]:
    pages = torch.randn(BLOCKS, 2, 2, 3, SIZE, 64, device="cuda").bfloat16()
    kv = KVMemory(pages, torch.full((BLOCKS, SIZE), -1, dtype=torch.int32, device="cuda"))
    return kv, DeviceCopier(kv, SLOTS)


def test_blocks_come_back_as_they_were_with_their_positions() -> None:
    kv, copier = make()
    before = kv.pages.clone()
    copier.start(CopyJob(Direction.TO_HOST, [4, 1], [3, 39], [16, 8]))
    (out,) = ended(copier, 1)
    assert out.error is None and out.seconds > 0
    kv.pages.zero_()
    copier.start(CopyJob(Direction.TO_DEVICE, [2, 5], [3, 39], [16, 8]))
    ended(copier, 1)
    assert torch.equal(kv.pages[2], before[4]) and torch.equal(kv.pages[5], before[1])
    assert kv.slot_positions[2].tolist() == list(range(16, 24))
    assert (kv.slot_positions[4] == -1).all()
    copier.close()


def test_a_copy_begins_after_the_compute_that_was_launched_before_it() -> None:
    kv, copier = make()
    large = torch.randn(4096, 4096, device="cuda")
    for round in range(5):
        for _ in range(20):
            large = large @ large / 4096  # keeps the compute stream busy
        kv.pages[7] = float(round)
        copier.start(CopyJob(Direction.TO_HOST, [7], [0], [0]))
        ended(copier, 1)
        copied = torch.frombuffer(copier.slot(0), dtype=torch.bfloat16)
        assert (copied == float(round)).all()
    copier.close()


def test_both_directions_at_once_end_in_order_each() -> None:
    kv, copier = make()
    before = kv.pages.clone()
    out = [CopyJob(Direction.TO_HOST, [i], [i], [0]) for i in range(20)]
    for job in out:
        copier.start(job)
    ended(copier, 20)
    kv.pages[:20] = 0
    back = [CopyJob(Direction.TO_DEVICE, [i], [i], [0]) for i in range(20)]
    more = [CopyJob(Direction.TO_HOST, [20 + i], [20 + i], [0]) for i in range(20)]
    for pair in zip(back, more, strict=True):
        for job in pair:
            copier.start(job)
    done = ended(copier, 40)
    assert [job for job in done if job.direction is Direction.TO_DEVICE] == back
    assert torch.equal(kv.pages, before)
    copier.close()
