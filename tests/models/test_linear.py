"""The packed linear layer gives what torch's gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.models.linear import PackedLinear


@given(
    rows=st.sampled_from([0, 1, 2, 7, 32, 200]), width=st.integers(1, 100), out=st.integers(1, 100), bias=st.booleans()
)
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_is_linear_within_rounding(dtype: torch.dtype, rows: int, width: int, out: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows * 10_000 + width * 100 + out)
    weight, x = torch.randn(out, width, generator=generator), torch.randn(rows, width, generator=generator)
    added = torch.randn(out, generator=generator) if bias else None
    packed = PackedLinear(weight.to(dtype), None if added is None else added.to(dtype))
    rounded = [value.to(dtype).double() for value in (x, weight)]
    exact = rounded[0] @ rounded[1].T + (0 if added is None else added.to(dtype).double())
    error = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(packed(x.to(dtype)).double(), exact, rtol=error, atol=error * 10)


def test_rows_that_are_a_view_give_the_same() -> None:
    weight, x = torch.randn(24, 16), torch.randn(10, 32)
    torch.testing.assert_close(PackedLinear(weight)(x[::2, 8:24]), x[::2, 8:24] @ weight.T)
