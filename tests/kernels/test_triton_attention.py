"""Paged attention in Triton, held to the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from kvarn.kernels import reference
from kvarn.kernels.triton import attention as triton_attention
from tests.kernels.paged import DTYPES, PagedCase, Sequence, make_case, paged_cases
from tests.kernels.triton_device import MARKS, there

pytestmark = MARKS

TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-4}, torch.bfloat16: {"atol": 1e-2, "rtol": 2e-2}}


def assert_like_reference(case: PagedCase) -> None:
    expected = case.run(reference.paged_attention, torch.float32)
    case.tensors = {name: there(tensor) for name, tensor in case.tensors.items()}
    case.options = {name: there(option) for name, option in case.options.items()}
    got = case.run(triton_attention.paged_attention)
    assert got.is_contiguous()
    assert got.dtype == case.tensors["query"].dtype
    torch.testing.assert_close(got.cpu().float(), expected, **TOLERANCE[got.dtype])


@given(case=paged_cases(most_sequences=2, most_rows=20, int8=True))
@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_equals_reference(case: PagedCase) -> None:
    """Whatever the shapes, strides, dtype, holes, order of slots, window, cap and sinks, plain or int8 cache."""
    assert_like_reference(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 200, "softcap": 20.0, "sinks": True}])
def test_long_contexts_cut_into_shares_equal_reference(options: dict[str, Any], int8: bool, dtype: torch.dtype) -> None:
    sequences = [Sequence(900, 1), Sequence(30, 1), Sequence(0, 1)]
    assert triton_attention._count_shares(4, 900, torch.device("cpu")) > 1
    assert_like_reference(
        make_case(
            sequences, dtype=dtype, kv_heads=1, group=3, head_dim=64, block_size=16, holes=0.05, permuted=True,
            fused=True, seed=3, options=options, int8=int8,
        )
    )  # fmt: skip


def test_rows_that_see_nothing_are_zero_whatever_unseen_slots_hold() -> None:
    case = make_case(
        [Sequence(20, 1), Sequence(0, 1)],
        dtype=torch.float32, kv_heads=1, group=2, head_dim=16, block_size=16, holes=0.0, permuted=False, fused=True,
        seed=1, options={},
    )  # fmt: skip
    case.tensors["positions"] = torch.tensor([3, 5], dtype=torch.int32)
    first, second = case.tensors["block_tables"][0, :2].tolist()
    case.tensors["kv"][first, :, :, :4] = 1.0
    case.tensors["kv"][first, :, :, 4:] = float("nan")
    case.tensors["kv"][second] = float("nan")
    case.tensors = {name: there(tensor) for name, tensor in case.tensors.items()}
    got = case.run(triton_attention.paged_attention)
    assert torch.equal(got[0], torch.ones_like(got[0]))
    assert torch.equal(got[1], torch.zeros_like(got[1]))
