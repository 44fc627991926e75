"""Which tokens of shared segments are computed anew: those whose keys deviate most where they stand.

    tokens    the most deviating ones of one prompt, wherever they are
    blocks    the most deviating blocks of a round, the same for all its members, so that the rest is the same for all
    first     the first blocks of each segment, without looking: each beginning draws attention it should not have

All are deterministic: of equal deviations, the earlier one counts.
Source: CacheBlend (arXiv 2405.16444), TokenDance (arXiv 2604.03143) 4.2, EPIC (arXiv 2410.15332).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor

import numpy as np
from numpy.typing import NDArray

Deviations = NDArray[np.float32]
"""[length] of a segment's tokens."""


def choose_tokens(deviations: Sequence[Deviations], share: float) -> list[NDArray[np.int32]]:
    """Of each segment of a prompt, the tokens to compute anew, rising: of all together, `share` (rounded down)."""
    count = floor(share * sum(map(len, deviations)))
    everything = np.concatenate([*deviations, np.empty(0, dtype=np.float32)])
    chosen = np.zeros(len(everything), dtype=np.bool_)
    chosen[np.argsort(-everything, kind="stable")[:count]] = True
    parts = np.split(chosen, np.cumsum([len(each) for each in deviations])[:-1])
    return [np.flatnonzero(part).astype(np.int32) for part in parts[: len(deviations)]]


def block_means(deviations: Deviations, sink: int, block_size: int) -> NDArray[np.float64]:
    """[blocks] mean deviation of the tokens in each block of a segment whose first token is in slot `sink`."""
    blocks = (np.arange(len(deviations)) + sink) // block_size
    counts = np.bincount(blocks)
    return np.bincount(blocks, weights=deviations.astype(np.float64)) / np.maximum(counts, 1)


def choose_blocks(means: Sequence[NDArray[np.float64]], share: float) -> list[frozenset[int]]:
    """Of each segment of a round, the blocks to compute anew: of all together, `share` (rounded up)."""
    places = [(-mean, i, number) for i, each in enumerate(means) for number, mean in enumerate(each.tolist())]
    chosen = sorted(places)[: ceil(share * len(places) - 1e-9)]
    return [frozenset(number for _, i, number in chosen if i == segment) for segment in range(len(means))]


def first_blocks(num_blocks: int, count: int) -> frozenset[int]:
    return frozenset(range(min(count, num_blocks)))
