"""The packed linear layer: every native version held to exact sums, and a row's bits to the row alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvarn.kernels import ops, reference

per_variant = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
rows = st.one_of(st.integers(0, 30), st.sampled_from([48, 49, 70, 100, 200]))


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@given(rows=rows, inputs=st.integers(1, 200), outputs=st.integers(1, 300), bias=st.booleans(), seed=st.integers(0, 999))
@per_variant
def test_sums_are_exact_up_to_one_rounding(
    variant: str, rows: int, inputs: int, outputs: int, bias: bool, seed: int
) -> None:
    x, weight = random(rows, inputs + 5, seed=seed)[:, :inputs], random(outputs, inputs, seed=seed + 1)
    added = random(outputs, seed=seed + 2) if bias else None
    packed = ops.pack_linear(weight)
    got = ops.packed_linear(x, packed, added, outputs)
    exact = x.double() @ weight.double().T + (0 if added is None else added.double())
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-4 * inputs**0.5)
    plain = reference.packed_linear(x, packed, added, outputs)
    torch.testing.assert_close(got, plain, rtol=2**-7, atol=1e-3 * inputs**0.5)


@pytest.mark.parametrize(("inputs", "outputs"), [(576, 960), (1536, 576), (33, 65)])
def test_a_row_gives_the_same_bits_alone_and_among_others(variant: str, inputs: int, outputs: int) -> None:
    x, packed = random(70, inputs, seed=1), ops.pack_linear(random(outputs, inputs, seed=2))
    together = ops.packed_linear(x, packed, None, outputs)
    for count in (1, 2, 3, 5, 11, 12, 13, 25, 47, 48, 69):
        assert torch.equal(ops.packed_linear(x[:count], packed, None, outputs), together[:count])


def test_threads_do_not_change_a_bit(variant: str) -> None:
    x, packed = random(100, 576, seed=3), ops.pack_linear(random(1536, 576, seed=4))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.packed_linear(x, packed, None, 1536))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("x", "outputs", "message"),
    [
        (torch.zeros(2, 10), 40, "bfloat16"),
        (torch.zeros(2, 14).bfloat16(), 40, "pairs"),
        (torch.zeros(2, 10).bfloat16(), 65, "out_features"),
    ],
)
def test_arguments_that_do_not_fit_are_named(x: torch.Tensor, outputs: int, message: str) -> None:
    packed = ops.pack_linear(random(40, 10, seed=0))
    with pytest.raises(RuntimeError, match=message):
        ops.packed_linear(x, packed, None, outputs)
