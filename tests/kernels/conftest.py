"""Every test here that asks for `variant` runs once per instruction set of the native kernels this machine has.

Those tests run on one thread, where waking a second one would only make them wait for a busy machine; the tests of
work shared among threads ask for `three_threads`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvarn.kernels import ops


@pytest.fixture(scope="module", params=ops.native_variants())
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    before, threads = ops.native_kernels(), torch.get_num_threads()
    assert before is not None
    ops.use_native_variant(request.param)
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(threads)
    ops.use_native_variant(before)
