"""Norms, rotary embedding with cache write and SiLU in Triton, held to the reference."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvarn.kernels import reference
from kvarn.kernels.triton import rowwise
from tests.kernels.rows import CacheCase, cache_cases, dtypes, extreme_gates, gates, leading, random, seeds
from tests.kernels.triton_device import MARKS, there

pytestmark = MARKS

# Triton's interpreter cuts bfloat16 off where a GPU rounds: up to one unit in the last place for each rounding.
TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 1e-2, "rtol": 2**-6}}
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got.cpu(), expected, **TOLERANCE[expected.dtype])


@given(leading=leading, features=st.integers(1, 700), dtype=dtypes, seed=seeds, extra=st.sampled_from([0, 3]))
@few
def test_norms_equal_reference(
    leading: tuple[int, ...], features: int, dtype: torch.dtype, seed: int, extra: int
) -> None:
    x = random(*leading, features + extra, dtype=dtype, seed=seed)[..., :features]
    residual = random(*leading, features + 2 * extra, dtype=dtype, seed=seed + 1)[..., :features]
    weight = random(features, dtype=dtype, seed=seed + 2)
    got = rowwise.rms_norm(there(x), there(weight), 1e-5)
    assert got.is_contiguous()
    assert_close(got, reference.rms_norm(x, weight, 1e-5))
    kept = there(residual.clone())
    got = rowwise.add_rms_norm(there(x), kept, there(weight), 1e-6)
    expected = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert_close(kept, residual)
    assert_close(got, expected)


@given(rows=st.integers(0, 20), features=st.integers(1, 1500), dtype=dtypes, seed=seeds)
@few
def test_silu_mul_equals_reference(rows: int, features: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = gates(rows, features, dtype, seed)
    assert_close(rowwise.silu_mul(there(gate_up)), reference.silu_mul(gate_up))


def test_silu_mul_of_extreme_gates() -> None:
    assert_close(rowwise.silu_mul(there(extreme_gates())), reference.silu_mul(extreme_gates()))


@given(case=cache_cases(int8=True))
@few
def test_rope_and_cache_equals_reference(case: CacheCase) -> None:
    (got_qkv, got_kv), (qkv_after, kv_after) = case.run(rowwise, there), case.run(reference)
    assert_close(got_qkv, qkv_after)
    if case.pages.dtype != torch.uint8:
        assert_close(got_kv, kv_after)
        return
    assert not got_kv[:, 0].any()
    dim, dtype = case.qkv.shape[2], case.qkv.dtype
    codes, scales = reference.quantised_kv(got_kv.cpu()[:, 1], dim)
    expected_codes, expected_scales = reference.quantised_kv(kv_after[:, 1], dim)
    torch.testing.assert_close(scales, expected_scales, atol=0.0, rtol=TOLERANCE[dtype]["rtol"])
    assert int((codes.int() - expected_codes.int()).abs().max()) <= (1 if dtype == torch.float32 else 2)
