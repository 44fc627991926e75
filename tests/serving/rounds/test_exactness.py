"""What reuse may not change, on a real (tiny, random) model in float32: where all is computed anew, and all before it.

Rotations are those of the tables that models are served with; everything else goes through whole engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig

from kvarn.kernels import ops
from kvarn.models.rope import cos_sin_table
from kvarn.models.sources import ModelFiles
from kvarn.serving.engine import Engine
from kvarn.serving.request import Request
from kvarn.serving.rounds.layout import Layout
from tests.models.tiny import SIZES, save_model
from tests.serving.test_conversations import AGENTS, SIZE, Part, Told, answers, ask, society, words

HEADS, KV_HEADS, WIDTH = 4, 2, 16
SCALE = WIDTH**-0.5
TABLES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=TABLES)
def table(request: pytest.FixtureRequest) -> torch.Tensor:
    return cos_sin_table(TABLES[request.param], WIDTH, 256)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return save_model(LlamaConfig(**SIZES | {"max_position_embeddings": 1024}), tmp_path_factory.mktemp("tiny"))


def turned(keys: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotated as a model rotates what it computes at these positions."""
    pages = torch.empty(len(keys), 2, keys.shape[1], 1, WIDTH)
    rows = torch.arange(len(keys), dtype=torch.int32)
    ops.rope_and_cache(torch.zeros(len(keys), 1, WIDTH), keys, keys, table, positions.int(), pages, rows)
    return pages[:, 0, :, 0]


# E1: what is rotated for one place is right for another.


def test_rotations_add_up(table: torch.Tensor) -> None:
    keys = torch.randn(64, KV_HEADS, WIDTH, generator=torch.Generator().manual_seed(1))
    one, other = torch.arange(64) * 2, torch.arange(64).flip(0)
    torch.testing.assert_close(turned(turned(keys, one, table), other, table), turned(keys, one + other, table))
    assert torch.equal(turned(keys, torch.zeros(64), table), keys)
    torch.testing.assert_close(turned(keys, one, table).norm(dim=2), keys.norm(dim=2))


def test_a_block_restored_for_a_place_is_computed_there(table: torch.Tensor) -> None:
    stored = torch.randn(1, 1, 2, KV_HEADS, SIZE, WIDTH, generator=torch.Generator().manual_seed(2))
    numbers, starts = torch.arange(4, dtype=torch.int32), torch.tensor([0, 3, 90, 240], dtype=torch.int32)
    pages = torch.empty(4, *stored.shape[1:])
    ops.restore_blocks(stored, stored[:0], torch.zeros_like(numbers), starts, numbers, table, pages)
    keys = stored[0, 0, 0].transpose(0, 1).contiguous()  # [SIZE, KV_HEADS, WIDTH]
    for page, start in zip(pages, starts.tolist(), strict=True):
        assert torch.equal(page[0, 0].transpose(0, 1), turned(keys, start + torch.arange(SIZE), table))
        assert torch.equal(page[0, 1], stored[0, 0, 1])


@pytest.mark.parametrize("shift", [0, 1, 57, 170, -1, -40])
def test_what_is_read_in_place_is_what_was_moved(table: torch.Tensor, shift: int) -> None:
    """A block encoded from position 40 on, read by a row `shift` further on, or further to the front."""
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(2 * SIZE, 2, KV_HEADS, WIDTH, generator=generator)  # of the block, then of the row's own
    query, at = torch.randn(1, HEADS, WIDTH, generator=generator), 40 + shift + SIZE + 3
    query = turned(query, torch.tensor([at]), table)
    own = at - SIZE + 1 + torch.arange(SIZE)

    def attention(encoded_for: int, shared: bool) -> torch.Tensor:
        places = torch.cat([encoded_for + torch.arange(SIZE), own])
        kv = torch.stack([turned(raw[:, 0].contiguous(), places, table), raw[:, 1]], dim=1)
        kv = kv.unflatten(0, (2, SIZE)).permute(0, 2, 3, 1, 4).contiguous()
        of_row = (torch.tensor([SIZE if shared else 2 * SIZE]), torch.tensor([0, 1]), torch.tensor([at]))
        slots, starts, positions = (each.int() for each in of_row)
        blocks = torch.tensor([[1] if shared else [0, 1]]).int()
        common = (query, kv, places.view(2, SIZE).int(), blocks, slots, starts, positions)
        if not shared:
            return ops.paged_attention(*common, SCALE)
        view = (torch.tensor([[0]]), torch.tensor([SIZE]), torch.tensor([0, 1]), torch.tensor([0]))
        return ops.shared_attention(*common, *(each.int() for each in view), torch.tensor([shift]).int(), table, SCALE)

    torch.testing.assert_close(attention(40, shared=True), attention(40 + shift, shared=False), atol=1e-5, rtol=1e-5)


# Whole engines.


def parts_of(agent: int, task: list[int] | None = None) -> list[Part]:
    """A beginning that all have, a history of his own, two shared texts in an order of his own, and a task."""
    texts = [words(45, 40), words(38, 41)]
    one, other = texts if agent % 2 else texts[::-1]
    return [
        ("private", words(20, 99) + words(11 + 9 * agent, agent)), ("shared", one),
        ("private", words(7 + agent, 10 + agent)), ("shared", other), ("task", task or words(9, 20)),
    ]  # fmt: skip


def members(task: list[int] | None = None) -> list[Request]:
    return [ask(f"{i}", parts_of(i, task), round="round", agent=f"agent {i}") for i in range(AGENTS)]


def plain(model: ModelFiles) -> dict[str, Told]:
    requests = [ask(f"{i}", [("private", [t for _, tokens in parts_of(i) for t in tokens])]) for i in range(AGENTS)]
    for request in requests:
        request.segments = ()
    return answers(society(model, reuse="exact"), *requests)


def assert_close(some: dict[str, Told], others: dict[str, Told], tolerance: float) -> None:
    """The same tokens, and the same likelihoods of the alternatives from first to last."""
    assert some.keys() == others.keys()
    for id, (tokens, tops, _) in some.items():
        assert tokens == others[id][0], id
        for one, other in zip(tops, others[id][1], strict=True):
            values = [[value for _, value in top] for top in (one, other)]
            assert np.allclose(*values, rtol=0, atol=tolerance), (id, np.abs(np.subtract(*values)).max())


@pytest.mark.parametrize("mode", ["serial", "batched", "collective", "lego"])
def test_where_all_is_computed_anew_reuse_is_exact(model: ModelFiles, mode: str) -> None:
    """E3"""
    engine = society(model, reuse=mode, reuse_share=1.0)
    assert engine.rounds is not None
    engine.rounds.settings = replace(engine.rounds.settings, lego_blocks=1000)
    told = answers(engine, *members())
    counters = engine.rounds.counters
    assert counters.refreshed_tokens == AGENTS * (45 + 38) and counters.reused_tokens == 0
    assert_close(told, plain(model), 1e-4)


def test_segments_change_nothing_where_prefixes_alone_are_reused(model: ModelFiles) -> None:
    engine = society(model, reuse="exact")
    assert engine.rounds is None
    assert_close(answers(engine, *members()), plain(model), 1e-4)


def computing(engine: Engine, requests: list[Request]) -> Iterator[tuple[Request, Layout]]:
    """Each request when its prompt is computed, while it still has its blocks; then all are finished."""
    for request in requests:
        engine.add(request)
    seen: set[str] = set()
    while engine.has_work:
        engine.step()
        for request in requests:
            if request.id not in seen and request.layout is not None and request.num_outputs:
                seen.add(request.id)
                yield request, request.layout
    assert len(seen) == len(requests)


def chosen(engine: Engine) -> dict[str, list[tuple[int, list[int]]]]:
    """Of each request's segments, where they stand and which tokens are computed anew."""
    return {
        request.id: [(each.start, np.flatnonzero(each.recomputed(SIZE)).tolist()) for each in layout.placed]
        for request, layout in computing(engine, members())
    }


@pytest.mark.parametrize("share", [0.15, 0.5])
def test_batched_does_what_serial_does(model: ModelFiles, share: float) -> None:
    """E7"""
    engines = [society(model, reuse=mode, reuse_share=share) for mode in ("serial", "batched")]
    serial, batched = (chosen(engine) for engine in engines)
    assert serial == batched
    assert all(any(tokens for _, tokens in placed) for placed in serial.values())
    passes = [engine.rounds.counters.selection_passes for engine in engines if engine.rounds is not None]
    assert passes == [AGENTS, 1]
    told = [answers(society(model, reuse=mode, reuse_share=share), *members()) for mode in ("serial", "batched")]
    assert_close(told[0], told[1], 1e-5)


def computed_kv(engine: Engine, task: list[int]) -> dict[str, tuple[NDArray[np.int32], torch.Tensor]]:
    """Of each request, the positions of the prompt that it computed itself, and their KV."""
    assert engine.rounds is not None
    pages: torch.Tensor = engine.rounds.executor.kv.pages  # type: ignore[attr-defined]
    found = {}
    for request, layout in computing(engine, members(task)):
        assert layout.reused > 0 and layout.refreshed > 0
        positions = layout.order
        numbers, offsets = np.divmod(layout.own_slots(positions), SIZE)
        found[request.id] = positions, pages[np.array(request.blocks)[numbers], :, :, :, offsets].clone()
    return found


@pytest.mark.parametrize("mode", ["serial", "batched", "collective", "lego"])
def test_no_token_sees_what_stands_behind_it(model: ModelFiles, mode: str) -> None:
    """E9"""
    task, changed = words(9, 20), 5
    other = [*task[:changed], task[changed] ^ 1, *task[changed + 1 :]]
    first, second = (computed_kv(society(model, reuse=mode), each) for each in (task, other))
    for id, (positions, kv) in first.items():
        place = sum(len(tokens) for _, tokens in parts_of(int(id))[:-1]) + changed
        assert np.array_equal(positions, second[id][0])
        earlier = positions < place
        assert torch.equal(kv[earlier], second[id][1][earlier])
        assert not torch.isclose(kv[~earlier], second[id][1][~earlier]).all(dim=(1, 2, 3, 4)).any()
