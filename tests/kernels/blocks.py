"""Arguments of `restore_blocks` for the CPU's and Triton's tests, and the dense way that it is held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.rows import dtypes, random, seeds

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@dataclass
class RestoreCase:
    """Arguments of `restore_blocks`."""

    master: Tensor
    diffs: Tensor
    sources: Tensor
    starts: Tensor
    targets: Tensor
    cos_sin: Tensor
    pages: Tensor

    def fused(self, kernels: Any, there: Any = lambda tensor: tensor) -> Tensor:
        """The pages after `kernels` have restored into them; `there` puts an argument on their device."""
        pages = there(self.pages.clone())
        kernels.restore_blocks(
            *map(there, (self.master, self.diffs, self.sources, self.starts, self.targets, self.cos_sin)), pages
        )
        return pages

    def dense(self, kernels: Any) -> Tensor:
        """The pages after each block was materialised, and written by `rope_and_cache` or `write_cache`."""
        pages = self.pages.clone()
        size = self.master.shape[4]
        for source, start, target in zip(*(x.tolist() for x in (self.sources, self.starts, self.targets)), strict=True):
            block = (self.master[source] if source >= 0 else self.diffs[~source]).clone()
            slots = torch.arange(target * size, (target + 1) * size, dtype=torch.int32)
            positions = torch.arange(start, start + size, dtype=torch.int32).clamp(max=self.cos_sin.shape[0] - 1)
            for layer in range(self.master.shape[1]):
                key, value = block[layer].transpose(1, 2)  # [B, Hkv, D]
                if start >= 0:
                    kernels.rope_and_cache(key.clone(), key, value, self.cos_sin, positions, pages[:, layer], slots)
                else:
                    kernels.write_cache(key, value, pages[:, layer], slots)
        return pages


@st.composite
def restore_cases(draw: st.DrawFn, *, adversarial: bool = False) -> RestoreCase:
    """Few blocks, any of whose jobs share a source. `adversarial`: any bits, and no keys to turn, in a plain cache."""
    layers, kv_heads, size, dim = (draw(st.integers(1, most)) for most in (3, 3, 20, 20))
    shared, own, jobs, dim = draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.integers(0, 12)), 8 * dim
    dtype, seed = draw(dtypes), draw(seeds)
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, 2, kv_heads, size, dim)
    stored = random(shared + own, layers + 1, *shape[1:], dtype=dtype, seed=seed)[:, 1:]
    if adversarial:
        bits = torch.randint(-(2**31), 2**31, stored.shape, generator=generator)
        stored = bits.to(BITS[dtype]).view(dtype)
    pages = random(jobs + 2, layers + 1, *shape[1:], dtype=dtype, seed=seed + 1)[:, :layers]
    if not adversarial and draw(st.booleans()):
        pages = torch.zeros(jobs + 2, layers + 1, 2, kv_heads, size * (dim + 4), dtype=torch.uint8)[:, :layers]
    rotary = max(2, int(dim * draw(st.sampled_from([0.25, 0.5, 1.0]))) // 2 * 2)
    angles = torch.rand(40, rotary // 2, generator=generator) * 6
    starts = torch.randint(-5, 40, (jobs,), generator=generator, dtype=torch.int32)
    return RestoreCase(
        stored[:shared],
        stored[shared:],
        torch.randint(-own, shared, (jobs,), generator=generator, dtype=torch.int32),
        starts.clamp(max=-1) if adversarial else starts,
        torch.randperm(jobs + 2, generator=generator)[:jobs].int(),
        torch.cat([angles.cos(), angles.sin()], dim=1),
        pages,
    )


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether all bits agree, of NaNs too."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
