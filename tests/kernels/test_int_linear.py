"""Linear layers of 8 and 4 bits: every native version does exactly what the reference says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvarn.kernels import ops, quantized

per_variant = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def packed(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return quantized.pack_int8(weight) if bits == 8 else quantized.pack_int4(quantized.quantize_int4(weight))


@given(
    rows=st.one_of(st.integers(0, 30), st.sampled_from([48, 70, 100])),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 150),
    bits=st.sampled_from([4, 8]),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
@per_variant
def test_products_are_the_reference_s(
    variant: str, rows: int, inputs: int, outputs: int, bits: int, bias: bool, seed: int
) -> None:
    x = random(rows, inputs + 5, seed=seed)[:, :inputs]
    weight = packed(random(outputs, inputs, seed=seed + 1), bits)
    added = random(outputs, seed=seed + 2) if bias else None
    got = ops.int_linear(x, weight, added, outputs, bits, float32=True)
    expected = quantized.int_linear(x, weight, added, outputs, bits, float32=True)
    # Without a fused multiply-add a code may round to its neighbour.
    atol = (1e-5 if variant != "portable" else 3e-2) * (1 + inputs**0.5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=atol)
    rounded = ops.int_linear(x, weight, added, outputs, bits)
    assert torch.equal(rounded, got.bfloat16())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 96), (1536, 64), (33, 65)])
def test_a_row_gives_the_same_bits_alone_and_among_others(variant: str, bits: int, inputs: int, outputs: int) -> None:
    x, weight = random(70, inputs, seed=1), packed(random(outputs, inputs, seed=2), bits)
    together = ops.int_linear(x, weight, None, outputs, bits, float32=True)
    for count in (1, 2, 5, 6, 7, 13, 47, 69):
        assert torch.equal(ops.int_linear(x[:count], weight, None, outputs, bits, float32=True), together[:count])


@pytest.mark.parametrize("bits", [4, 8])
def test_threads_do_not_change_a_bit(three_threads: None, bits: int) -> None:
    x, weight = random(100, 576, seed=3), packed(random(1536, 576, seed=4), bits)
    several = ops.int_linear(x, weight, None, 1536, bits)
    torch.set_num_threads(1)
    assert torch.equal(ops.int_linear(x, weight, None, 1536, bits), several)


@given(scale=st.floats(1e-30, 1e30), seed=st.integers(0, 99))
@per_variant
def test_rows_of_any_size_keep_two_digits(variant: str, scale: float, seed: int) -> None:
    x, weight = random(3, 64, seed=seed) * scale, random(32, 64, seed=seed + 1)
    x[1] = 0
    got = ops.int_linear(x, packed(weight, 8), None, 32, 8, float32=True)
    exact = x.double() @ weight.double().T
    assert float((got.double() - exact).norm()) <= 0.03 * float(exact.norm())
    assert not got[1].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_layouts_hold_the_quantised_weight(bits: int) -> None:
    weight = random(70, 96, seed=7).float()
    kept = quantized.unpack(packed(weight, bits), 70, 96, bits)
    levels = 254 if bits == 8 else 15
    spread = weight.abs().amax(1, keepdim=True) * 2 if bits == 8 else weight.view(70, 3, 32).amax(2).max() * 2
    assert float(((kept - weight).abs() / spread).max()) <= 0.51 / levels + 1e-3


def test_four_bit_weights_that_come_quantised_stay_as_they_are() -> None:
    once = quantized.quantize_int4(random(64, 64, seed=5))
    again = quantized.quantize_int4(once.dequantized())
    torch.testing.assert_close(again.dequantized(), once.dequantized(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("x", "bits", "message"),
    [(torch.zeros(2, 64), 8, "bfloat16"), (torch.zeros(2, 96).bfloat16(), 8, "bytes for x's features"),
     (torch.zeros(2, 64).bfloat16(), 4, "bytes for x's features")],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(x: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        ops.int_linear(x, quantized.pack_int8(torch.zeros(40, 64)), None, 40, bits)
