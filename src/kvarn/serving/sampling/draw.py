"""The random numbers that tokens are drawn by.

A draw is a pure function of a row of logits, its request's settings and one uniform number (`kernels.ops.sample`), and
the uniform is a hash of (seed, output index): nothing depends on which other rows are in the batch, or when.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def uniforms(seeds: NDArray[np.uint64], indexes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) from (seed, output index), by the finaliser of splitmix64 applied to either in turn."""
    mixed = _mix(_mix(seeds) + indexes)
    # 52 bits: the largest number times any total still rounds to less than the total.
    return (mixed >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)  # array arithmetic wraps, as the hash wants
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
