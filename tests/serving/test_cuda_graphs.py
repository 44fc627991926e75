"""Decode steps filled up to captured sizes give what the decoder gives, and touch no one's memory.

Here `capture` only keeps the work to be repeated; tests/gpu makes real graphs of it.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from kvarn.models.loader import load_decoder
from kvarn.models.spec import Decoder, ForwardBatch, KVMemory
from kvarn.serving.executors.cuda_graphs import DeviceForward, Work, graph_sizes
from kvarn.serving.executors.staging import Layout, copy_batch
from tests.models.paged import PagedRunner
from tests.models.tiny import SIZES, save_model

MAX_REQUESTS = 12
BLOCK_SIZE = 4
SPARE_BLOCKS = 2


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    files = save_model(LlamaConfig(**SIZES), tmp_path_factory.mktemp("tiny-llama"))
    return load_decoder(files, precision="float32")


class Repeated:
    """A decoder whose decode steps are repeated over static memory; counts the repetitions of each size."""

    def __init__(self, decoder: Decoder, kv: KVMemory) -> None:
        self.spec = decoder.spec
        self.repeats = dict.fromkeys(graph_sizes(MAX_REQUESTS), 0)
        self._captured = iter(reversed(graph_sizes(MAX_REQUESTS)))
        self._forward = DeviceForward(
            decoder, kv, max_rows=64, max_requests=MAX_REQUESTS, max_context=64, num_spare_blocks=SPARE_BLOCKS,
            capture=self._capture,
        )  # fmt: skip

    def _capture(self, work: Work) -> Work:
        work()
        size = next(self._captured)

        def repeat() -> None:
            self.repeats[size] += 1
            work()

        return repeat

    def forward(self, batch: ForwardBatch, kv: KVMemory) -> torch.Tensor:
        return self._forward.run(batch)


def runners(decoder: Decoder) -> tuple[PagedRunner, PagedRunner, Repeated]:
    plain, repeated = PagedRunner(decoder, block_size=BLOCK_SIZE), PagedRunner(decoder, block_size=BLOCK_SIZE)
    for runner in (plain, repeated):
        runner.free = [block for block in runner.free if block < len(runner.kv.pages) - SPARE_BLOCKS]
    repeated.decoder = forward = Repeated(decoder, repeated.kv)
    return plain, repeated, forward


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 9, 12])
def test_filled_up_decode_steps_equal_the_decoder(decoder: Decoder, count: int) -> None:
    plain, repeated, forward = runners(decoder)
    prompts = {i: list(range(3 + i, 3 + i + 5)) for i in range(count)}
    for chunks in (prompts, {i: [i + 1] for i in prompts}, {i: [i + 2] for i in prompts}):
        torch.testing.assert_close(repeated.step(chunks), plain.step(chunks))
    assert forward.repeats == {
        size: 2 * (size == min(s for s in forward.repeats if s >= count)) for size in forward.repeats
    }


def test_filling_rows_write_into_spare_blocks_alone(decoder: Decoder) -> None:
    plain, repeated, forward = runners(decoder)
    for chunks in ({i: [4, 5, 6] for i in range(9)}, {i: [7] for i in range(9)}):
        plain.step(chunks)
        repeated.step(chunks)
    assert forward.repeats[16] == 1
    assert torch.equal(repeated.kv.pages[:-SPARE_BLOCKS], plain.kv.pages[:-SPARE_BLOCKS])
    assert torch.equal(repeated.kv.slot_positions[:-SPARE_BLOCKS], plain.kv.slot_positions[:-SPARE_BLOCKS])


def test_steps_with_prompts_or_without_logits_are_not_repeated(decoder: Decoder) -> None:
    plain, repeated, forward = runners(decoder)
    for chunks, options in (({0: [5, 6]}, {}), ({0: [7], 1: [8, 9]}, {}), ({0: [1], 1: [2]}, {"no_rows": True})):
        torch.testing.assert_close(repeated.step(chunks, **options), plain.step(chunks, **options))
    assert not any(forward.repeats.values())


def test_layout_separates_and_aligns_the_tensors() -> None:
    layout = Layout(rows=5, sequences=3, table_width=7, logits=2)
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    views = layout.views(buffer)
    batch = ForwardBatch(
        torch.arange(5) + 10, torch.arange(5).int() + 20, torch.arange(5).int() + 30,
        torch.arange(21).view(3, 7).int() + 40, torch.arange(3).int() + 70, torch.arange(4).int() + 80,
        torch.arange(2) + 90,
    )  # fmt: skip
    copy_batch(batch, views)
    again = layout.views(buffer)
    for name in set(ForwardBatch.__slots__) - {"views"}:
        assert torch.equal(getattr(again, name), getattr(batch, name))
        assert getattr(again, name).data_ptr() % 64 == buffer.data_ptr() % 64
    assert Layout.of(batch) == layout
