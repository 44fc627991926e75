"""Arguments of the row-wise operators (norms, rotation with cache write, SiLU) for the CPU's and Triton's tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.paged import DTYPES

dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31)
leading = st.one_of(st.just(()), st.tuples(st.integers(0, 9)), st.tuples(st.integers(0, 9), st.integers(1, 5)))


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gates(rows: int, features: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[rows, 2 * features] of a wider tensor: what `silu_mul` takes."""
    return random(rows, 2 * features + 3, dtype=dtype, seed=seed)[:, : 2 * features] * 8


def extreme_gates() -> Tensor:
    gate = torch.tensor([[-1e30, -200.0, -90.0, 0.0, 90.0, 200.0, 1e30]])
    return torch.cat([gate, torch.ones_like(gate)], dim=1)


@dataclass
class CacheCase:
    """Arguments of `rope_and_cache`, or of `write_cache` where nothing is to be turned (`cos_sin` None)."""

    qkv: Tensor
    """[rows, heads + 2 * kv_heads, dim]"""
    heads: tuple[int, int, int]
    pages: Tensor
    """[blocks, 2 layers, 2, kv_heads, ...]; the second layer is written"""
    cos_sin: Tensor | None
    positions: Tensor
    slots: Tensor

    def run(self, kernels: Any, there: Any = lambda tensor: tensor) -> tuple[Tensor, Tensor]:
        """qkv and pages after `kernels` have changed them; `there` puts an argument on their device."""
        qkv, pages, slots = there(self.qkv.clone()), there(self.pages.clone()), there(self.slots)
        query, key, value = qkv.split(self.heads, dim=1)
        if self.cos_sin is None:
            kernels.write_cache(key, value, pages[:, 1], slots)
        else:
            positions = there(self.positions)
            kernels.rope_and_cache(query, key, value, there(self.cos_sin), positions, pages[:, 1], slots)
        return qkv, pages


@st.composite
def cache_cases(draw: st.DrawFn, *, int8: bool) -> CacheCase:
    """Rotations of all, half, a quarter or none of a head, into a plain cache or (`int8`) perhaps one of 8 bits."""
    rows, kv_heads = draw(st.integers(0, 20)), draw(st.sampled_from([1, 2, 3, 4, 9]))
    heads, dim = kv_heads * draw(st.integers(1, 4)), 8 * draw(st.integers(1, 32))
    share, block_size = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])), draw(st.integers(1, 20))
    dtype, seed = draw(dtypes), draw(seeds)
    generator = torch.Generator().manual_seed(seed)
    if draw(st.booleans()):  # heads before rows, as in transformers
        qkv = random(heads + 2 * kv_heads, rows, dim, dtype=dtype, seed=seed).transpose(0, 1)
    else:
        qkv = random(rows, (heads + 2 * kv_heads) * dim, dtype=dtype, seed=seed).unflatten(1, (-1, dim))
    num_blocks = rows // block_size + 2
    if int8 and draw(st.booleans()):
        pages = torch.zeros(num_blocks, 2, 2, kv_heads, block_size * (dim + 4), dtype=torch.uint8)
    else:
        pages = random(num_blocks, 2, 2, kv_heads, block_size, dim, dtype=dtype, seed=seed + 1)
    angles = torch.rand(30, max(2, int(dim * share) // 2 * 2) // 2, generator=generator) * 6
    return CacheCase(
        qkv,
        (heads, kv_heads, kv_heads),
        pages,
        torch.cat([angles.cos(), angles.sin()], dim=1) if share else None,
        torch.randint(0, 30, (rows,), generator=generator, dtype=torch.int32),
        torch.randperm(num_blocks * block_size, generator=generator)[:rows].int(),
    )
