"""Mirrors restored into the pool: the same bytes as materialised and restored block by block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.kernels import ops
from kvarn.serving.executors.mirror_restore import Placement, restore_mirrors
from kvarn.serving.kvcache.mirror_family import MemberCache
from kvarn.serving.kvcache.mirrors import MirrorStore
from tests.kernels.blocks import same_bytes
from tests.kernels.triton_device import DEVICE, MARKS, there

pytestmark = MARKS
LAYERS, BLOCK = 4, (4, 2, 2, 8, 16)
ARRAYS = {torch.bfloat16: np.uint16, torch.float32: np.uint32}


def members_of(size: int, dtype: torch.dtype, changed: float, seed: int) -> dict[str, MemberCache]:
    """Members with the same five blocks but for some of their layers, in orders of their own, and one of their own."""
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    common = torch.randn(5, *BLOCK, generator=generator).to(dtype)
    members = {}
    for i in range(size):
        blocks = torch.cat([common, torch.randn(1, *BLOCK, generator=generator).to(dtype)])
        blocks[:5][torch.from_numpy(rng.random((5, LAYERS)) < changed)] *= 2.0
        order = rng.permutation(6)
        keys = [*(("shared", j) for j in range(5)), (f"own {i}", 0)]
        array = blocks.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).numpy().view(ARRAYS[dtype])
        members[f"agent {i}"] = MemberCache(tuple(keys[j] for j in order), array[order])
    return members


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 5), st.sampled_from(list(ARRAYS)), st.sampled_from([0.0, 0.2, 1.0]), st.booleans(),
    st.integers(0, 1000),
)  # fmt: skip
def test_mirrors_are_restored_as_their_dense_copies_would_be(
    size: int, dtype: torch.dtype, changed: float, int8: bool, seed: int
) -> None:
    members = members_of(size, dtype, changed, seed)
    store = MirrorStore(10**9)
    store.store("round", members)
    rng = np.random.default_rng(seed)
    shape = (*BLOCK[:3], BLOCK[3] * (BLOCK[4] + 4)) if int8 else BLOCK
    pages = torch.zeros(6 * size, *shape, dtype=torch.uint8 if int8 else dtype, device=DEVICE)
    expected = pages.clone()
    cos_sin = there(torch.randn(100, BLOCK[4], generator=torch.Generator().manual_seed(seed)))
    targets = rng.permutation(6 * size).reshape(size, 6)
    targets[rng.random((size, 6)) < 0.2] = -1
    starts = rng.integers(-30, 100, (size, 6))
    placements = []
    for i, (name, put) in enumerate(members.items()):
        view = store.get("round", name)
        assert view is not None
        placements.append(Placement(view, starts[i].tolist(), targets[i].tolist()))
        dense = there(torch.from_numpy(put.blocks).view(dtype))
        for j in np.flatnonzero(targets[i] >= 0):
            lists = (there(torch.tensor([int(x)], dtype=torch.int32)) for x in (j, starts[i, j], targets[i, j]))
            ops.restore_blocks(dense, dense[:0], *lists, cos_sin, expected)
    restore_mirrors(placements, cos_sin, pages, dtype)
    assert same_bytes(pages.cpu(), expected.cpu())


def test_views_of_two_families_are_refused() -> None:
    store = MirrorStore(10**9)
    for family in "xy":
        store.store(family, members_of(1, torch.float32, 0.0, 1))
    views = [store.get(family, "agent 0") for family in "xy"]
    placements = [Placement(view, [0] * 6, [0] * 6) for view in views if view is not None]
    with pytest.raises(ValueError, match="several families"):
        restore_mirrors(placements, torch.zeros(9, 16), torch.zeros(1, *BLOCK), torch.float32)
    restore_mirrors([], torch.zeros(9, 16), torch.zeros(1, *BLOCK), torch.float32)
