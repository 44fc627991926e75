"""The copying thread, on real memory."""

from __future__ import annotations

import torch

from kvarn.models.spec import KVMemory
from kvarn.serving.executors.host_copier import HostCopier
from kvarn.serving.kvcache.copies import CopyJob, Direction

BLOCKS, SLOTS, SIZE = 6, 4, 8


def make() -> tuple[KVMemory, HostCopier]:
    pages = torch.randn(BLOCKS, 2, 2, 3, SIZE, 16).bfloat16()
    kv = KVMemory(pages, torch.full((BLOCKS, SIZE), -1, dtype=torch.int32))
    return kv, HostCopier(kv, SLOTS)


def ended(copier: HostCopier, count: int) -> list[CopyJob]:
    jobs: list[CopyJob] = []
    while len(jobs) < count:
        copier.wait(10.0)
        jobs += copier.finished()
    return jobs


def test_blocks_come_back_as_they_were_with_their_positions():
    kv, copier = make()
    before = kv.pages.clone()
    out = CopyJob(Direction.TO_HOST, [4, 1], [3, 0], [16, 8])
    copier.start(out)
    assert ended(copier, 1) == [out] and out.error is None and out.seconds > 0
    assert torch.equal(kv.pages, before) and (kv.slot_positions == -1).all()
    kv.pages.zero_()
    back = CopyJob(Direction.TO_DEVICE, [2, 5], [3, 0], [16, 8])
    copier.start(back)
    ended(copier, 1)
    assert torch.equal(kv.pages[2], before[4]) and torch.equal(kv.pages[5], before[1])
    assert kv.slot_positions[2].tolist() == list(range(16, 24)) and kv.slot_positions[5].tolist() == list(range(8, 16))
    assert (kv.slot_positions[[0, 1, 3, 4]] == -1).all()
    copier.close()


def test_jobs_end_in_order_and_one_that_fails_does_not_end_the_thread():
    _, copier = make()
    bad = CopyJob(Direction.TO_HOST, [0, 1], [0], [0, 8])
    good = CopyJob(Direction.TO_HOST, [0], [1], [0])
    copier.start(bad)
    copier.start(good)
    assert ended(copier, 2) == [bad, good]
    assert bad.error is not None and good.error is None
    copier.close()


def test_waiting_ends_without_news_too():
    _, copier = make()
    copier.wait(0.001)
    assert copier.finished() == []
    copier.close()
