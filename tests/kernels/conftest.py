"""Every test here that asks for `variant` runs once per instruction set of the native kernels this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvarn.kernels import ops


@pytest.fixture(scope="module", params=ops.native_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    before = ops.native_kernels()
    ops.use_native_variant(request.param)
    yield request.param
    assert before is not None
    ops.use_native_variant(before)
