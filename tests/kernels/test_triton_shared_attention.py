"""Attention to own and shared slots in Triton, held to the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from kvarn.kernels import reference
from kvarn.kernels.triton import attention as triton_attention
from kvarn.kernels.triton import shared_attention as triton_shared_attention
from tests.kernels.paged import DTYPES, PagedCase, Sequence
from tests.kernels.shared import make_shared_case, shared_cases
from tests.kernels.test_triton_attention import TOLERANCE
from tests.kernels.triton_device import MARKS, there

pytestmark = MARKS


def assert_like_reference(case: PagedCase) -> None:
    expected = case.run(reference.shared_attention, torch.float32)
    case.tensors = {name: there(tensor) for name, tensor in case.tensors.items()}
    case.options = {name: there(option) for name, option in case.options.items()}
    got = case.run(triton_shared_attention.shared_attention)
    assert got.is_contiguous()
    assert got.dtype == case.tensors["query"].dtype
    torch.testing.assert_close(got.cpu().float(), expected, **TOLERANCE[got.dtype])


@given(case=shared_cases(most_rows=8, int8=True))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_equals_reference(case: PagedCase) -> None:
    """Whatever the shapes, strides, dtype, views, shifts, holes, window, cap and sinks, plain or int8 cache."""
    assert_like_reference(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"window": 400, "softcap": 20.0, "sinks": True}])
def test_long_views_cut_into_shares_equal_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert triton_attention._count_shares(4, 600, torch.device("cpu")) > 1
    case = make_shared_case(
        [Sequence(30, 1), Sequence(0, 1), Sequence(20, 2)], [600], most_viewers=0, rotary=32, factor=1.0, dtype=dtype,
        kv_heads=1, group=3, head_dim=64, block_size=16, holes=0.05, permuted=True, fused=True, seed=3, options=options,
        int8=True,
    )  # fmt: skip
    case.tensors |= {
        "rows": torch.tensor([2, 0, 1, 0], dtype=torch.int32), "row_starts": torch.tensor([0, 4], dtype=torch.int32),
        "shifts": torch.tensor([30, -40, 7, 0], dtype=torch.int32),
        "positions": torch.tensor([630, 300, 5, 640], dtype=torch.int32),
    }  # fmt: skip
    assert_like_reference(case)
