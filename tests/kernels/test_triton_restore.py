"""Restoring stored blocks in Triton, held to the reference; what is copied, to the bit."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings

from kvarn.kernels import reference
from kvarn.kernels.triton import restore
from tests.kernels.blocks import RestoreCase, restore_cases, same_bytes
from tests.kernels.triton_device import MARKS, there

pytestmark = MARKS
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@given(case=restore_cases())
@few
def test_restore_blocks_equals_reference(case: RestoreCase) -> None:
    got, expected = case.fused(restore, there).cpu(), case.fused(reference)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    bfloat16 = case.master.dtype == torch.bfloat16
    if case.pages.dtype != torch.uint8:
        torch.testing.assert_close(got, expected, atol=1e-2 if bfloat16 else 1e-5, rtol=2**-6 if bfloat16 else 1e-5)
        return
    for layer in range(got.shape[1]):
        codes, scales = reference.quantised_kv(got[:, layer], case.master.shape[5])
        expected_codes, expected_scales = reference.quantised_kv(expected[:, layer], case.master.shape[5])
        torch.testing.assert_close(scales, expected_scales, atol=0.0, rtol=2**-6 if bfloat16 else 1e-5)
        assert int((codes.int() - expected_codes.int()).abs().max()) <= (2 if bfloat16 else 1)


@given(case=restore_cases(adversarial=True))
@few
def test_what_is_copied_keeps_every_bit(case: RestoreCase) -> None:
    assert same_bytes(case.fused(restore, there).cpu(), case.fused(reference))
