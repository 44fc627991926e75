"""Token ids for simulated prompts: arithmetic in place of random draws, because nobody reads them.

What matters of a simulated prompt is its length and what it shares: blocks of equal id and segments of equal content
are equal, all others differ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvarn.simulation.workloads import RequestSpec

_MIX = np.uint64(0x9E3779B97F4A7C15)
_STIR = np.uint64(0xBF58476D1CE4E5B9)
_SHIFT = np.uint64(32)
_OWN = 1 << 62
"""Set in the block id of what a request shares with nobody."""


def prompt_tokens(spec: RequestSpec, index: int, vocabulary: int) -> NDArray[np.int32]:
    """Shape (spec.prompt_tokens,), ids below `vocabulary`; `index` tells requests apart where they share nothing."""
    width = spec.prefix_block_tokens
    shared = min(len(spec.prefix_ids) * width, spec.prompt_tokens)
    blocks = np.repeat(np.array(spec.prefix_ids, dtype=np.uint64), width)[:shared]
    seeds = np.full(spec.prompt_tokens, _OWN + index, dtype=np.uint64)
    seeds[:shared] = blocks
    tokens, place = mixed_tokens(seeds, vocabulary), 0
    for part in spec.segments:
        count = part.segment.tokens
        if part.segment.kind == "shared":  # the same wherever it stands
            tokens[place : place + count] = mixed_tokens(np.full(count, part.content, dtype=np.uint64), vocabulary)
        place += count
    return tokens


def mixed_tokens(seeds: NDArray[np.uint64], vocabulary: int) -> NDArray[np.int32]:
    """One id below `vocabulary` for each place, by its seed; shape of `seeds`: (tokens,)."""
    places = np.arange(len(seeds), dtype=np.uint64)
    mixed = (seeds * _MIX) ^ ((places + np.uint64(1)) * _STIR)
    mixed = (mixed ^ (mixed >> _SHIFT)) * _MIX
    tokens: NDArray[np.int32] = ((mixed >> _SHIFT) % np.uint64(vocabulary)).astype(np.int32)
    return tokens
