"""Segments on a real (tiny, random) model: what is stored is what computing in that place gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig

from kvarn.models.loader import load_decoder
from kvarn.models.spec import Decoder, KVMemory
from kvarn.serving.executors.segments import TorchSegments
from kvarn.serving.rounds.segment import StoredSegment
from kvarn.serving.rounds.work import EncodeJob
from tests.models.paged import PagedRunner
from tests.models.tiny import SIZES, save_model

SIZE = 4


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    files = save_model(LlamaConfig(**SIZES), tmp_path_factory.mktemp("tiny-llama"))
    return load_decoder(files, precision="float32")


def keys_and_values(kv: KVMemory, blocks: list[int], slots: NDArray[np.int64]) -> torch.Tensor:
    """[slots, L, 2, Hkv, D]"""
    numbers, offsets = np.divmod(slots, SIZE)
    return kv.pages[np.array(blocks)[numbers], :, :, :, offsets]


class Store:
    """Segments by hand: blocks of the pool from 0 on, of the segment memory from the other end."""

    def __init__(self, decoder: Decoder) -> None:
        self.kv = PagedRunner(decoder, num_blocks=64, block_size=SIZE).kv
        self.segments = TorchSegments(decoder, self.kv, 64)
        self.used = 0

    def segment(self, tokens: list[int], sink: list[int], before: list[int]) -> StoredSegment:
        made = StoredSegment(
            b"", "", *(np.array(each, dtype=np.int32) for each in (sink, tokens, before)),
        )  # fmt: skip
        count = made.num_blocks(SIZE)
        made.blocks = list(range(self.used, self.used + count))
        made.canonical = [63 - block for block in made.blocks]
        self.used += count
        return made

    def encode(self, *jobs: EncodeJob) -> None:
        self.segments.encode(jobs)
        for job in jobs:
            job.segment.encoded += job.count

    def of(self, segment: StoredSegment) -> torch.Tensor:
        return keys_and_values(self.kv, segment.blocks, segment.sink + np.arange(segment.length))


SINK, FIRST, SECOND = [1, 2, 3], [10, 11, 12, 13, 14, 15, 16], [20, 21, 22, 23, 24, 25]


def prefilled(decoder: Decoder, tokens: list[int], start: int, end: int) -> torch.Tensor:
    """What an ordinary prefill of the tokens leaves at positions `start` to `end`."""
    runner = PagedRunner(decoder, num_blocks=64, block_size=SIZE)
    runner.step({0: tokens})
    return keys_and_values(runner.kv, runner.blocks[0], np.arange(start, end))


def test_an_encoded_segment_has_the_kv_of_a_prefill_behind_its_sink(decoder):
    store = Store(decoder)
    segment = store.segment(FIRST, SINK, [])
    store.encode(EncodeJob(segment, 4))
    store.encode(EncodeJob(segment, 6))  # the rest, in another step
    torch.testing.assert_close(store.of(segment), prefilled(decoder, SINK + FIRST, 3, 10))
    assert store.kv.slot_positions[segment.blocks].flatten().tolist() == [-1, -1, -1, *range(3, 10), -1, -1]


@pytest.mark.parametrize("steps", [1, 3])
def test_segments_encoded_behind_one_another_have_the_kv_of_one_prefill(decoder, steps):
    store = Store(decoder)
    first, second = store.segment(FIRST, SINK, []), store.segment(SECOND, [], SINK + FIRST)
    if steps == 1:
        store.encode(EncodeJob(first, 10), EncodeJob(second, 6, (first,)))
    else:
        store.encode(EncodeJob(first, 10))
        store.encode(EncodeJob(second, 2, (first,)))
        store.encode(EncodeJob(second, 4, (first,)))
    expected = prefilled(decoder, SINK + FIRST + SECOND, 3, 16)
    torch.testing.assert_close(torch.cat([store.of(first), store.of(second)]), expected)
    for segment in (first, second):  # nobody sees the sink
        seen = store.kv.slot_positions[segment.blocks].flatten()
        assert seen[seen >= 0].tolist() == list(range(segment.origin, segment.origin + segment.length))


def test_what_is_loaded_from_the_segment_memory_is_what_was_encoded(decoder):
    store = Store(decoder)
    first, second = store.segment(FIRST, SINK, []), store.segment(SECOND, [], SINK + FIRST)
    store.encode(EncodeJob(first, 10), EncodeJob(second, 6, (first,)))
    before = [store.of(first), store.of(second)]
    first.blocks, second.blocks = [*second.blocks[:1], 40, 41], [42, 43]
    store.segments.load([first, second])
    for segment, expected in zip((first, second), before, strict=True):
        assert torch.equal(store.of(segment), expected)
        seen = store.kv.slot_positions[segment.blocks].flatten()
        assert seen[seen >= 0].tolist() == list(range(segment.origin, segment.origin + segment.length))


def test_layer_0_does_not_depend_on_what_stands_before(decoder):
    """E2: keys before rotation and values are the same bits wherever a segment is encoded."""
    store = Store(decoder)
    alone, behind = store.segment(SECOND, SINK, []), store.segment(SECOND, [], SINK + FIRST)
    first = store.segment(FIRST, SINK, [])
    store.encode(EncodeJob(alone, 9), EncodeJob(first, 10), EncodeJob(behind, 6, (first,)))

    def canonical(segment: StoredSegment, layer: int) -> torch.Tensor:
        numbers, offsets = np.divmod(segment.sink + np.arange(segment.length), SIZE)
        return store.segments.memory[np.array(segment.canonical)[numbers], layer, :, :, offsets]

    assert torch.equal(canonical(alone, 0), canonical(behind, 0))
    assert not torch.equal(canonical(alone, 1), canonical(behind, 1))
