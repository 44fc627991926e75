"""The numbers that draws are made of."""

from __future__ import annotations

import numpy as np

from kvarn.serving.sampling import draw


def test_uniforms_are_uniform_and_independent_between_seeds_and_indexes() -> None:
    seeds, indexes = np.meshgrid(np.arange(300, dtype=np.uint64), np.arange(300, dtype=np.uint64))
    numbers = draw.uniforms(seeds.ravel(), indexes.ravel())
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert len(np.unique(numbers)) == numbers.size
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 900) ** 2 / 900).sum() < 150  # chi-square, 99 degrees of freedom: p = 0.0007
    grid = numbers.reshape(300, 300)
    assert abs(np.corrcoef(grid[:-1].ravel(), grid[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(grid[:, :-1].ravel(), grid[:, 1:].ravel())[0, 1]) < 0.02
