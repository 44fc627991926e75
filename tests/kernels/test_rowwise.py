"""Norms, rotary embedding with cache write, SiLU: every native version held to the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvarn.kernels import ops, reference
from tests.kernels.rows import CacheCase, cache_cases, dtypes, extreme_gates, gates, leading, random, seeds

TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 1e-2, "rtol": 1e-2}}
per_variant = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, **TOLERANCE[expected.dtype])


@given(leading=leading, features=st.integers(1, 700), dtype=dtypes, seed=seeds, strided=st.booleans())
@per_variant
def test_rms_norm_equals_reference(
    variant: str, leading: tuple[int, ...], features: int, dtype: torch.dtype, seed: int, strided: bool
) -> None:
    x = random(*leading, features + 3 * strided, dtype=dtype, seed=seed)[..., :features]
    weight = random(features, dtype=dtype, seed=seed + 1)
    got = ops.rms_norm(x, weight, 1e-5)
    assert got.is_contiguous()
    assert_close(got, reference.rms_norm(x, weight, 1e-5))


@given(leading=leading, features=st.integers(1, 700), dtype=dtypes, seed=seeds)
@per_variant
def test_add_rms_norm_adds_to_the_residual_and_norms_it(
    variant: str, leading: tuple[int, ...], features: int, dtype: torch.dtype, seed: int
) -> None:
    x = random(*leading, features, dtype=dtype, seed=seed)
    wide = random(*leading, features + 5, dtype=dtype, seed=seed + 1)
    native, plain = wide.clone()[..., :features], wide.clone()[..., :features]
    weight = random(features, dtype=dtype, seed=seed + 2)
    assert_close(ops.add_rms_norm(x, native, weight, 1e-6), reference.add_rms_norm(x, plain, weight, 1e-6))
    assert torch.equal(native, plain)


@given(rows=st.integers(0, 40), features=st.integers(1, 700), dtype=dtypes, seed=seeds)
@per_variant
def test_silu_mul_equals_reference(variant: str, rows: int, features: int, dtype: torch.dtype, seed: int) -> None:
    gate_up = gates(rows, features, dtype, seed)
    assert_close(ops.silu_mul(gate_up), reference.silu_mul(gate_up))


def test_silu_mul_of_extreme_gates(variant: str) -> None:
    assert_close(ops.silu_mul(extreme_gates()), reference.silu_mul(extreme_gates()))


@given(case=cache_cases(int8=False))
@per_variant
def test_rope_and_cache_equals_reference(variant: str, case: CacheCase) -> None:
    for got, expected in zip(case.run(ops), case.run(reference), strict=True):
        assert_close(got, expected)


@given(rows=st.integers(0, 20), block_size=st.integers(1, 20), dtype=dtypes, seed=seeds)
@per_variant
def test_write_cache_stores_rows_as_they_are(
    variant: str, rows: int, block_size: int, dtype: torch.dtype, seed: int
) -> None:
    num_blocks = rows // block_size + 2
    key, value = (random(3, rows, 24, dtype=dtype, seed=seed + i).transpose(0, 1) for i in range(2))
    pages = torch.zeros(num_blocks, 2, 2, 3, block_size, 24, dtype=dtype)
    slots = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(seed))[:rows].int()
    ops.write_cache(key, value, pages[:, 1], slots)
    flat = pages[:, 1].permute(1, 0, 3, 2, 4).flatten(1, 2)  # [2, slots, heads, dim]
    assert torch.equal(flat[0, slots.long()], key)
    assert torch.equal(flat[1, slots.long()], value)
    assert int(flat.ne(0).any(-1).any(-1).sum()) == 2 * rows
    assert pages[:, 0].eq(0).all()


@given(
    rows=st.integers(0, 20), eighths=st.integers(1, 32), block_size=st.integers(1, 20), dtype=dtypes, seed=seeds,
)  # fmt: skip
@per_variant
def test_an_int8_cache_holds_rows_to_half_a_127th_of_their_largest_magnitude(
    variant: str, rows: int, eighths: int, block_size: int, dtype: torch.dtype, seed: int
) -> None:
    dim, num_blocks = 8 * eighths, rows // block_size + 2
    key, value = (random(3, rows, dim, dtype=dtype, seed=seed + i).transpose(0, 1) for i in range(2))
    if rows:
        key[0, 0] = 0.0
    slots = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(seed))[:rows].int()
    for kernels in (ops, reference):
        pages = torch.zeros(num_blocks, 2, 2, 3, block_size * (dim + 4), dtype=torch.uint8)
        kernels.write_cache(key, value, pages[:, 1], slots)  # type: ignore[attr-defined]
        codes, scales = reference.quantised_kv(pages[:, 1], dim)
        flat = (codes * scales[..., None]).permute(1, 0, 3, 2, 4).flatten(1, 2)  # [2, slots, heads, dim]
        for got, rows_in in zip(flat, (key.float(), value.float()), strict=True):
            most = rows_in.abs().amax(-1, keepdim=True) / 254
            assert ((got[slots.long()] - rows_in).abs() <= most * 1.001).all()
        assert pages[:, 0].eq(0).all()
        assert int(codes.ne(0).any(-1).sum()) <= 2 * 3 * rows


def test_slots_and_positions_out_of_range_are_refused() -> None:
    key = torch.zeros(1, 2, 8)
    kv, cos_sin = torch.zeros(4, 2, 2, 16, 8), torch.zeros(10, 8)
    for slot, position, message in (
        (64, 0, r"slots in \[0, 64\)"),
        (-1, 0, "got -1"),
        (0, 10, r"positions in \[0, 10\)"),
    ):
        slots, positions = torch.tensor([slot], dtype=torch.int32), torch.tensor([position], dtype=torch.int32)
        with pytest.raises(RuntimeError, match=message):
            ops.rope_and_cache(key.clone(), key, key, cos_sin, positions, kv, slots)
