"""Paged attention: the reference is held to torch's own attention, every native version to the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvarn.kernels import ops, reference
from tests.kernels.paged import PagedCase, Sequence, make_case, paged_cases

TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-4}, torch.bfloat16: {"atol": 1e-2, "rtol": 2e-2}}
# Queries and weights have 8 bits where the processor multiplies those.
INT8_TOLERANCE = {"atol": 4e-2, "rtol": 2e-2}
per_variant = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def dense_case(rows: int, slots: int, dtype: torch.dtype = torch.float32, int8: bool = False) -> PagedCase:
    """One sequence of `slots` tokens, its last `rows` of them query rows."""
    case = make_case(
        [Sequence(slots, rows)],
        dtype=dtype, kv_heads=2, group=3, head_dim=64, block_size=16, holes=0.0, permuted=False, fused=True, seed=rows,
        options={}, int8=int8,
    )  # fmt: skip
    case.tensors["positions"] = torch.arange(slots - rows, slots, dtype=torch.int32)
    return case


def assert_like_reference(case: PagedCase) -> None:
    expected = case.run(reference.paged_attention, torch.float32)
    got = case.run(ops.paged_attention)
    assert got.dtype == case.tensors["query"].dtype
    tolerance = INT8_TOLERANCE if case.tensors["kv"].dtype == torch.uint8 else TOLERANCE[got.dtype]
    torch.testing.assert_close(got.float(), expected, **tolerance)


@given(case=paged_cases(int8=True))
@per_variant
def test_native_equals_reference(variant: str, case: PagedCase) -> None:
    """Whatever the shapes, strides, dtype, holes, order of slots, window, cap and sinks."""
    assert_like_reference(case)


def relative_error(case: PagedCase) -> float:
    expected = case.run(reference.paged_attention, torch.float32)
    return float((case.run(ops.paged_attention).float() - expected).norm() / expected.norm())


@given(
    rows=st.integers(20, 200),
    before=st.integers(0, 200),
    group=st.integers(1, 5),
    head_dim=st.sampled_from([64, 80, 128]),
    window=st.one_of(st.none(), st.integers(1, 200)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(per_variant, max_examples=30)
def test_a_prompt_over_an_int8_cache_keeps_two_digits(
    variant: str, rows: int, before: int, group: int, head_dim: int, window: int | None, dtype: torch.dtype
) -> None:
    """Wherever the rows begin. A query's rounding moves a logit of size 1 by about 0.01, a weight's moves it less."""
    case = make_case(
        [Sequence(before + rows, rows)], dtype=dtype, kv_heads=2, group=group, head_dim=head_dim, block_size=16,
        holes=0.0, permuted=False, fused=True, seed=rows, options={"window": window} if window else {}, int8=True,
    )  # fmt: skip
    case.tensors["positions"] = torch.arange(before, before + rows, dtype=torch.int32)
    assert relative_error(case) < 0.02


@pytest.mark.parametrize("size", [0.0, 1e-3, 1e-2])
def test_a_first_token_with_most_weight_and_small_values_leaves_the_others_their_digits(
    variant: str, size: float
) -> None:
    """What trained models do: 95 % of the weight lies on the first token, and what the output says is in the rest."""
    case = dense_case(40, 200, int8=True)
    codes, scales = reference.quantised_kv(case.tensors["kv"], 64)
    first = case.tensors["block_tables"][0, 0]
    codes[first, 0, :, 0], codes[first, 0, :, 0, :16], scales[first, 0, :, 0] = 0, 127, 2 / 127
    case.tensors["query"][..., :16] += 2  # 64 from the first key, a logit of 8
    codes[first, 1, :, 0], scales[first, 1, :, 0] = 127, size / 127
    assert relative_error(case) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "slots"), [(1, 5000), (7, 3000), (300, 900)])
@pytest.mark.parametrize("int8", [False, True])
def test_long_sequences_split_over_threads_equal_reference(
    variant: str, three_threads: None, dtype: torch.dtype, rows: int, slots: int, int8: bool
) -> None:
    assert_like_reference(dense_case(rows, slots, dtype, int8))


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("int8", [False, True])
def test_decode_of_every_group_and_head_dimension_equals_reference(
    variant: str, group: int, head_dim: int, int8: bool
) -> None:
    """One row and a few, in blocks that vectors divide: with holes, a window that ends inside a block, cap, sinks."""
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({}, {"window": 37, "softcap": 20.0, "sinks": True}):
            assert_like_reference(
                make_case(
                    [Sequence(300, 1), Sequence(21, 2), Sequence(0, 1), Sequence(64, 4)], dtype=dtype, kv_heads=2,
                    group=group, head_dim=head_dim, block_size=16, holes=0.1, permuted=False, fused=True,
                    seed=group, options=dict(options), int8=int8,
                )
            )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"window": 300, "softcap": 20.0, "sinks": True}])
def test_uneven_batches_on_several_threads_equal_reference(
    variant: str, three_threads: None, options: dict[str, object]
) -> None:
    sequences = [Sequence(40, 1)] * 20 + [Sequence(2500, 2), Sequence(0, 1), Sequence(300, 300)]
    for int8 in (False, True):
        assert_like_reference(
            make_case(
                sequences, dtype=torch.float32, kv_heads=2, group=2, head_dim=32, block_size=16, holes=0.05,
                permuted=True, fused=True, seed=3, options=dict(options), int8=int8,
            )
        )  # fmt: skip


@pytest.mark.parametrize("rows", [1, 17, 40])
def test_reference_equals_torch_attention_on_dense_causal_sequences(rows: int) -> None:
    slots = 40
    case = dense_case(rows, slots)
    blocks = case.tensors["block_tables"][0, : (slots + 15) // 16].long()
    key, value = case.tensors["kv"][blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :slots]
    mask = torch.ones(slots, slots, dtype=torch.bool).tril()[-rows:]
    query = case.tensors["query"].transpose(0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, scale=case.scale, enable_gqa=True
    )
    torch.testing.assert_close(case.run(reference.paged_attention), expected[0].transpose(0, 1), atol=1e-5, rtol=1e-4)


def test_rows_computed_together_equal_rows_computed_one_by_one(variant: str) -> None:
    case = dense_case(20, 100)
    together = case.run(ops.paged_attention)
    for row in range(20):
        alone = case.tensors | {
            "query": case.tensors["query"][row : row + 1],
            "positions": case.tensors["positions"][row : row + 1],
            "query_starts": torch.tensor([0, 1], dtype=torch.int32),
        }
        torch.testing.assert_close(PagedCase(alone, case.scale).run(ops.paged_attention)[0], together[row])


def test_row_that_may_look_at_nothing_gives_zeros(variant: str) -> None:
    case = dense_case(3, 40)
    case.tensors["slot_positions"].fill_(-1)
    for options in ({}, {"sinks": torch.zeros(6)}, {"window": 4}):
        case.options = options
        assert case.run(ops.paged_attention).eq(0).all()
        assert case.run(reference.paged_attention).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_nobody_may_see_do_not_leak_even_when_they_hold_nan(variant: str, dtype: torch.dtype) -> None:
    case = dense_case(4, 70, dtype)
    case.tensors["positions"] -= 20  # the last 20 slots lie in the future of every row
    clean = case.run(ops.paged_attention)
    kv, positions = case.tensors["kv"], case.tensors["slot_positions"]
    hidden = (positions < 0) | (positions > int(case.tensors["positions"].max()))
    kv[hidden[:, None, None, :].expand(kv.shape[:-1])] = float("nan")
    assert torch.equal(case.run(ops.paged_attention), clean)
    torch.testing.assert_close(case.run(reference.paged_attention), clean, **TOLERANCE[dtype])


def test_large_logits_do_not_overflow(variant: str) -> None:
    case = dense_case(5, 90)
    case.tensors["query"] = case.tensors["query"] * 1e4
    assert_like_reference(case)


@pytest.mark.parametrize(
    ("argument", "replacement", "message"),
    [
        ("query", torch.zeros(4, 6, 60), "head dimension"),
        ("query", torch.zeros(4, 5, 64), "multiple of the kv heads"),
        ("query", torch.zeros(4, 6, 64, dtype=torch.float64), "KVARN_KERNELS=reference"),
        ("query", torch.zeros(4, 6, 64, dtype=torch.bfloat16), "dtype of query"),
        ("positions", torch.zeros(4, dtype=torch.int64), "int32"),
        ("positions", torch.zeros(3, dtype=torch.int32), "query rows"),
        ("kv_slots", torch.tensor([4000], dtype=torch.int32), "got 4000 for sequence 0"),
        ("block_tables", torch.full((1, 5), 99, dtype=torch.int32), "got 99 for sequence 0"),
        ("block_tables", torch.full((1, 5), -1, dtype=torch.int32), "got -1 for sequence 0"),
        ("query_starts", torch.tensor([0, 3], dtype=torch.int32), "rising from 0"),
    ],
)
def test_wrong_arguments_are_named(argument: str, replacement: torch.Tensor, message: str) -> None:
    case = dense_case(4, 60)
    case.tensors[argument] = replacement
    with pytest.raises(RuntimeError, match=message):
        case.run(ops.paged_attention)
