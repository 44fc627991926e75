"""Norms, rotary embedding with cache write and SiLU in Triton, held to the reference."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvarn.kernels import reference
from kvarn.kernels.triton import rowwise
from tests.kernels.triton_device import MARKS, there

pytestmark = MARKS

# Triton's interpreter cuts bfloat16 off where a GPU rounds: up to one unit in the last place for each rounding.
TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 1e-2, "rtol": 2**-6}}
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 2**31)
leading = st.one_of(st.just(()), st.tuples(st.integers(0, 9)), st.tuples(st.integers(0, 9), st.integers(1, 5)))


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
    gate_up = random(rows, 2 * features + 3, dtype=dtype, seed=seed)[:, : 2 * features] * 8
    assert_close(rowwise.silu_mul(there(gate_up)), reference.silu_mul(gate_up))


def test_silu_mul_of_extreme_gates() -> None:
    gate = torch.tensor([[-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30]])
    gate_up = torch.cat([gate, torch.ones_like(gate)], dim=1)
    assert_close(rowwise.silu_mul(there(gate_up)), reference.silu_mul(gate_up))


@given(
    rows=st.integers(0, 12), kv_heads=st.sampled_from([1, 3, 9]), group=st.integers(1, 4), eighths=st.integers(1, 20),
    share=st.sampled_from([0.0, 0.25, 0.5, 1.0]), block_size=st.integers(1, 20), dtype=dtypes, seed=seeds,
    heads_first=st.booleans(), int8=st.booleans(),
)  # fmt: skip
@few
def test_rope_and_cache_equals_reference(
    rows: int, kv_heads: int, group: int, eighths: int, share: float, block_size: int, dtype: torch.dtype, seed: int,
    heads_first: bool, int8: bool,
) -> None:  # fmt: skip
    """For `share` zero: write_cache, which turns nothing."""
    dim, heads = 8 * eighths, kv_heads * group
    g = torch.Generator().manual_seed(seed)
    if heads_first:
        qkv = random(heads + 2 * kv_heads, rows, dim, dtype=dtype, seed=seed).transpose(0, 1)
    else:
        qkv = random(rows, (heads + 2 * kv_heads) * dim, dtype=dtype, seed=seed).unflatten(1, (-1, dim))
    num_blocks = rows // block_size + 2
    pages = random(num_blocks, 2, 2, kv_heads, block_size, dim, dtype=dtype, seed=seed + 1)
    if int8:
        pages = torch.zeros(num_blocks, 2, 2, kv_heads, block_size * (dim + 4), dtype=torch.uint8)
    angles = torch.rand(30, max(2, int(dim * share) // 2 * 2) // 2, generator=g) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    positions = torch.randint(0, 30, (rows,), generator=g, dtype=torch.int32)
    slots = torch.randperm(num_blocks * block_size, generator=g)[:rows].int()

    def run(kernels: object, there: object) -> tuple[torch.Tensor, torch.Tensor]:
        mine, kv = there(qkv.clone()), there(pages.clone())
        query, key, value = mine.split([heads, kv_heads, kv_heads], dim=1)
        if share:
            kernels.rope_and_cache(query, key, value, there(cos_sin), there(positions), kv[:, 1], there(slots))
        else:
            kernels.write_cache(key, value, kv[:, 1], there(slots))
        return mine, kv

    (got_qkv, got_kv), (qkv_after, kv_after) = run(rowwise, there), run(reference, lambda tensor: tensor)
    assert_close(got_qkv, qkv_after)
    if not int8:
        assert_close(got_kv, kv_after)
        return
    assert not got_kv[:, 0].any()
    codes, scales = reference.quantised_kv(got_kv.cpu()[:, 1], dim)
    expected_codes, expected_scales = reference.quantised_kv(kv_after[:, 1], dim)
    torch.testing.assert_close(scales, expected_scales, atol=0.0, rtol=TOLERANCE[dtype]["rtol"])
    assert int((codes.int() - expected_codes.int()).abs().max()) <= (1 if dtype == torch.float32 else 2)
