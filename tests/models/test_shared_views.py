"""Batches whose rows look at KV that others share: what decoders give for them, natively and op by op."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from kvarn.errors import ModelError
from kvarn.models.decoder_transformers import TransformersDecoder
from kvarn.models.loader import load_decoder
from kvarn.models.precision import Precision
from kvarn.models.spec import ForwardBatch, SharedViews
from tests.models.paged import PagedRunner
from tests.models.test_decoders import random_tokens
from tests.models.test_native_forward import FAMILIES, both
from tests.models.tiny import SIZES, save_model

SHARED = 48
HISTORIES = (40, 21)
CHUNKS = (9, 1)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def round_batch(runner: PagedRunner, shared: int, shifts: tuple[int, ...]) -> ForwardBatch:
    """Sequences 0 and 1 go on behind the tokens of sequence `shared`, which they have not computed themselves."""
    tokens, positions, slots, tables = random_tokens(sum(CHUNKS), 8), [], [], []
    for agent, (shift, rows) in enumerate(zip(shifts, CHUNKS, strict=True)):
        begin = runner.computed.get(agent, 0)
        at = begin + torch.arange(rows)
        tables.append([*runner.blocks.get(agent, []), runner.free.pop()])
        slots.append(torch.tensor(tables[-1])[at // 16] * 16 + at % 16)
        positions.append(torch.arange(rows) + SHARED + shift)
    width = max(map(len, tables))
    counts = [runner.computed.get(agent, 0) + rows for agent, rows in enumerate(CHUNKS)]
    batch = ForwardBatch(
        torch.tensor(tokens), torch.cat(positions).int(), torch.cat(slots).int(),
        torch.tensor([table + [0] * (width - len(table)) for table in tables]).int(), ints(*counts),
        ints(0, CHUNKS[0], sum(CHUNKS)), torch.arange(sum(CHUNKS)),
        SharedViews(
            torch.tensor([runner.blocks[shared]]).int(), ints(SHARED), ints(0, sum(CHUNKS)),
            torch.arange(sum(CHUNKS)).int(), ints(*[shifts[0]] * CHUNKS[0], *[shifts[1]] * CHUNKS[1]),
        ),
    )  # fmt: skip
    runner.kv.slot_positions.view(-1)[batch.slots.long()] = batch.positions
    return batch


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("kv_dtype", [None, torch.int8])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_gives_the_bits_of_single_ops(
    family: str, precision: Precision, kv_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    shared, alone = [], []
    for decoder in both(family, precision, tmp_path):
        runner = PagedRunner(decoder, kv_dtype=kv_dtype)
        runner.step({0: random_tokens(HISTORIES[0], 1), 1: random_tokens(HISTORIES[1], 2), 2: random_tokens(SHARED, 3)})
        batch = round_batch(runner, shared=2, shifts=HISTORIES)
        shared.append(decoder.forward(batch, runner.kv).float())
        alone.append(decoder.forward(replace(batch, views=None), runner.kv).float())
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(alone[0], alone[1])
    assert not torch.isclose(shared[0], alone[0]).all(dim=1).any()


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.05)])
@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "default"}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}],
    ids=lambda rope: rope["rope_type"],
)
def test_shared_tokens_give_what_own_tokens_give_wherever_they_stand(
    rope: dict[str, object], precision: Precision, tolerance: float, tmp_path: Path
) -> None:
    """Only distances count: behind shared tokens, at any shift, rows are as behind the same tokens of their own."""
    config = transformers.LlamaConfig(**SIZES, rope_parameters={"rope_theta": 10000.0, **rope})
    decoder = load_decoder(save_model(config, tmp_path), precision=precision)
    own, sharing = PagedRunner(decoder), PagedRunner(decoder)
    shared, tokens = random_tokens(SHARED, 3), random_tokens(sum(CHUNKS), 8)
    own.step({0: shared, 1: shared})
    expected = own.step({0: tokens[: CHUNKS[0]], 1: tokens[CHUNKS[0] :]}, every_row=True).float()
    sharing.step({2: shared})
    got = decoder.forward(round_batch(sharing, shared=2, shifts=(120, 7)), sharing.kv).float()
    difference = (got - expected).norm(dim=1) / expected.norm(dim=1)
    assert difference.max() < tolerance


def test_views_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    decoder, _ = both("llama", "int8", tmp_path)
    runner = PagedRunner(decoder)
    runner.step({2: random_tokens(SHARED, 3)})
    batch = round_batch(runner, shared=2, shifts=(1, 2))
    assert batch.views is not None
    batch.views.shifts[-1] = 256
    with pytest.raises(RuntimeError, match=r"shifts.*got 256"):
        decoder.forward(batch, runner.kv)


def test_models_that_rotate_in_their_own_way_refuse_views(tmp_path: Path) -> None:
    files = save_model(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=199), tmp_path)
    decoder = load_decoder(files, precision="float32")
    assert isinstance(decoder, TransformersDecoder) and not decoder.shares_views
    runner = PagedRunner(decoder)
    runner.step({2: random_tokens(SHARED, 3)})
    with pytest.raises(ModelError, match="views"):
        decoder.forward(round_batch(runner, shared=2, shifts=(1, 2)), runner.kv)
