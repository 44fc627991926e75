"""Linear layers with weights of 8 and 4 bits in Triton, held to the weight that their layout holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.kernels import quantized
from kvarn.kernels.triton import linear
from tests.kernels.triton_device import MARKS, there

pytestmark = MARKS

TOLERANCE = {torch.float32: {"atol": 1e-4, "rtol": 1e-4}, torch.bfloat16: {"atol": 0.02, "rtol": 0.02}}


def assert_equals_the_layouts_weight(
    rows: int, outputs: int, inputs: int, bits: int, dtype: torch.dtype, with_bias: bool, float32: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=g) / inputs**0.5
    packed = quantized.pack_int8(weight) if bits == 8 else quantized.pack_int4(quantized.quantize_int4(weight))
    x = torch.randn(rows, inputs + 5, generator=g).to(dtype)[:, :inputs]
    bias = torch.randn(outputs, generator=g).to(dtype) if with_bias else None
    got = linear.int_linear(there(x), there(packed), there(bias), outputs, bits, float32)
    assert got.dtype == (torch.float32 if float32 else dtype)
    expected = x.float() @ quantized.unpack(packed, outputs, inputs, bits).T
    if bias is not None:
        expected += bias.float()
    torch.testing.assert_close(got.cpu().float(), expected, **TOLERANCE[dtype])


@given(
    rows=st.integers(0, 20), outputs=st.integers(1, 70), groups=st.integers(1, 12), bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), with_bias=st.booleans(), float32=st.booleans(),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_few_rows(
    rows: int, outputs: int, groups: int, bits: int, dtype: torch.dtype, with_bias: bool, float32: bool, seed: int
) -> None:
    inputs = 32 * groups - (seed % 30 if bits == 8 else 0)
    assert_equals_the_layouts_weight(rows, outputs, inputs, bits, dtype, with_bias, float32, seed)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows(bits: int, dtype: torch.dtype) -> None:
    assert_equals_the_layouts_weight(65, 50, 96 if bits == 4 else 90, bits, dtype, True, False, 1)
