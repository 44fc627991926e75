"""Restoring stored blocks in one pass: byte for byte what materialising each and writing it gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from kvarn.kernels import ops, reference
from tests.kernels.blocks import RestoreCase, restore_cases, same_bytes

per_variant = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(case=restore_cases())
@per_variant
def test_fused_restore_equals_the_dense_one_byte_for_byte(variant: str, case: RestoreCase) -> None:
    assert same_bytes(case.fused(ops), case.dense(ops))


@given(case=restore_cases(adversarial=True))
@per_variant
def test_what_is_copied_keeps_every_bit(variant: str, case: RestoreCase) -> None:
    got = case.fused(ops)
    assert same_bytes(got, case.dense(ops))
    assert same_bytes(got, case.fused(reference))


@given(case=restore_cases())
@settings(max_examples=40, deadline=None)
def test_the_reference_equals_its_dense_restore(case: RestoreCase) -> None:
    assert same_bytes(case.fused(reference), case.dense(reference))


@pytest.mark.parametrize("past_caches", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_restores_on_several_threads(
    variant: str, three_threads: None, past_caches: bool, dtype: torch.dtype
) -> None:
    """More than the caches hold is written past them, to blocks that begin in the middle of a line too."""
    layers, shared, agents = 5, 4, 30 if past_caches else 2
    jobs = agents * shared
    stored = torch.randn(shared + agents, layers, 2, 3, 16, 64).to(dtype)
    sources = torch.arange(shared).repeat(agents)
    sources[::shared] = -1 - torch.arange(agents)
    width = stored[0].numel()
    pages = torch.zeros((jobs + 1) * (width + 2), dtype=dtype)[2:]
    pages = pages.as_strided((jobs, *stored.shape[1:]), (width + 2, *stored.stride()[1:]))
    case = RestoreCase(
        stored[:shared], stored[shared:], sources.int(), torch.arange(jobs).int() - 3,
        torch.randperm(jobs).int(), torch.randn(300, 64), pages,
    )  # fmt: skip
    assert same_bytes(case.fused(ops), case.dense(ops))


def test_arguments_that_do_not_fit_are_refused() -> None:
    blocks, pages, cos_sin = torch.zeros(2, 1, 2, 1, 4, 8), torch.zeros(3, 1, 2, 1, 4, 8), torch.zeros(10, 8)

    def restore(source: int = 0, start: int = 0, target: int = 0, pages: torch.Tensor = pages) -> None:
        lists = (torch.tensor([value], dtype=torch.int32) for value in (source, start, target))
        ops.restore_blocks(blocks, blocks[:1], *lists, cos_sin, pages)

    restore()
    restore(source=-1, start=9, target=2)
    for source, start, target, message in (
        (2, 0, 0, r"sources .*values in \[-1, 2\).*got 2 for job 0"),
        (-2, 0, 0, "got -2"),
        (0, 10, 0, "rows of cos_sin"),
        (0, 0, 3, r"values in \[0, 3\) \(blocks of pages\)"),
        (0, 0, -1, "got -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            restore(source, start, target)
    with pytest.raises(RuntimeError, match="dtype of master"):
        restore(pages=pages.bfloat16())
    with pytest.raises(RuntimeError, match="slots of D"):
        restore(pages=torch.zeros(3, 1, 2, 1, 44, dtype=torch.uint8))
