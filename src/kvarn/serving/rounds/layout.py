"""Where the KV of a prompt is when some of it is that of shared segments, and what is left to compute.

Tokens before the first shared segment are a prefix like any other. Of a shared segment, each block is either reused or
computed anew in its place; everything else is computed. Reused tokens count as computed from the start, the others are
computed in the order of their positions:

    position    0 ... prefix | segment A, kept | A, anew | private | segment B, kept | task | outputs
    computed    2nd            at once           3rd       4th       at once           5th    6th

Reused blocks are read where they lie, through views, or copied to blocks of the request's own (`dense`).

Source: TokenDance (arXiv 2604.03143), 4.2; CacheBlend (arXiv 2405.16444) for computing some tokens anew; EPIC (arXiv
2410.15332) for choosing them without looking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvarn.serving.rounds.segment import StoredSegment


@dataclass(frozen=True, slots=True)
class Placed:
    """A stored segment in a prompt."""

    segment: StoredSegment
    start: int
    """Position of its first token."""
    refreshed: frozenset[int] = frozenset()
    """Numbers of its blocks whose tokens are computed anew."""
    tokens: NDArray[np.int32] | None = None
    """Single tokens of it that are computed anew, rising; only where KV is copied."""

    @property
    def end(self) -> int:
        return self.start + self.segment.length

    @property
    def shift(self) -> int:
        """What its tokens' positions are more here than where they were encoded."""
        return self.start - self.segment.origin

    def recomputed(self, block_size: int) -> NDArray[np.bool_]:
        """[length] which of its tokens are computed anew."""
        if self.tokens is not None:
            chosen = np.zeros(self.segment.length, dtype=np.bool_)
            chosen[self.tokens] = True
            return chosen
        blocks = (np.arange(self.segment.length) + self.segment.sink) // block_size
        return np.isin(blocks, list(self.refreshed))


@dataclass(frozen=True, slots=True)
class View:
    """A segment's blocks as a request reads them where they lie."""

    segment: StoredSegment
    numbers: tuple[int, ...]
    """Which of its blocks."""
    shift: int


@dataclass(frozen=True, slots=True)
class CopiedBlock:
    """A segment's block that is copied to a block of the request's own."""

    segment: StoredSegment
    number: int
    start: int
    """Position that its first slot stands for in the request."""
    own: int
    """Which of the request's blocks."""


@dataclass(frozen=True, slots=True)
class Layout:
    """See the module."""

    prompt_length: int
    prefix: int
    """Leading tokens that are no part of a reused segment: their KV, and no other's, is exact."""
    order: NDArray[np.int32]
    """Positions of the tokens to compute, rising."""
    slots: NDArray[np.int32]
    """[prompt_length] where each token's KV is in the request's own blocks; -1: in a view."""
    surplus: int
    """Slots that the prompt takes in the request's own blocks, less its tokens."""
    views: tuple[View, ...]
    copies: tuple[CopiedBlock, ...]
    placed: tuple[Placed, ...]
    resumed: int = 0
    """Leading tokens of those in its own blocks whose KV is kept from a request that this one continues."""

    @property
    def reused(self) -> int:
        """Tokens whose KV is there from the start."""
        return self.prompt_length - len(self.order)

    @property
    def refreshed(self) -> int:
        """Tokens of shared segments that are computed anew."""
        return sum(each.segment.length for each in self.placed) - self.reused

    @property
    def needs_copying(self) -> bool:
        """Whether own blocks get KV of segments, or have slots between tokens, which must be known to be empty."""
        return bool(self.copies) or self.surplus > 0

    def positions(self, start: int, end: int) -> NDArray[np.int32]:
        """Positions of the tokens that are computed as number `start` to `end`."""
        reused = self.reused
        first = self.order[start - reused : max(start, end) - reused]
        rest = np.arange(max(start, self.prompt_length), end, dtype=np.int32)
        return np.concatenate([first, rest]) if len(rest) else first

    def own_slots(self, positions: NDArray[np.int32]) -> NDArray[np.int32]:
        """Slots in the request's own blocks for the KV of computed tokens."""
        inside = positions < self.prompt_length
        slots: NDArray[np.int32] = np.where(
            inside, self.slots[np.minimum(positions, self.prompt_length - 1)], positions + self.surplus
        ).astype(np.int32)
        return slots

    def slots_in_use(self, computed: int) -> int:
        """Leading slots of the request's own blocks that may hold KV when so many tokens are computed."""
        return (max(computed, self.prompt_length) if self.copies else computed) + self.surplus


def lay_out(prompt_length: int, placed: Sequence[Placed], block_size: int, *, dense: bool) -> Layout:
    """The layout of a prompt with these segments, which do not overlap and are in the order of their positions.

    The last token is always computed: its logits are what the request waits for.
    """
    placed = [_with_last(each, prompt_length, block_size, dense) for each in placed]
    viewed = np.zeros(prompt_length, dtype=np.bool_)
    for each in placed:
        viewed[each.start : each.end] = ~each.recomputed(block_size)
    order = np.flatnonzero(~viewed).astype(np.int32)
    prefix = placed[0].start if placed else prompt_length
    if dense:
        slots, copies, total = _aligned_slots(prompt_length, placed, block_size)
        return Layout(prompt_length, prefix, order, slots, total - prompt_length, (), copies, tuple(placed))
    slots = np.full(prompt_length, -1, dtype=np.int32)
    slots[order] = np.arange(len(order), dtype=np.int32)
    views = tuple(
        View(each.segment, numbers, each.shift)
        for each in placed
        if (numbers := tuple(i for i in range(each.segment.num_blocks(block_size)) if i not in each.refreshed))
    )
    return Layout(prompt_length, prefix, order, slots, len(order) - prompt_length, views, (), tuple(placed))


def _with_last(each: Placed, prompt_length: int, block_size: int, dense: bool) -> Placed:
    if each.end < prompt_length:
        return each
    if each.tokens is not None:
        tokens = np.union1d(each.tokens, [each.segment.length - 1]).astype(np.int32)
        return Placed(each.segment, each.start, each.refreshed, tokens)
    return Placed(each.segment, each.start, each.refreshed | {each.segment.num_blocks(block_size) - 1})


def _aligned_slots(
    prompt_length: int, placed: Sequence[Placed], block_size: int
) -> tuple[NDArray[np.int32], tuple[CopiedBlock, ...], int]:
    """Slots of a prompt whose segments' blocks lie in blocks of the request's own, row by row as in the segments'."""
    slots = np.empty(prompt_length, dtype=np.int32)
    copies: list[CopiedBlock] = []
    position = slot = 0
    for each in placed:
        between = each.start - position
        slots[position : each.start] = np.arange(slot, slot + between)
        first = -(-(slot + between) // block_size)
        slot = first * block_size + each.segment.sink
        slots[each.start : each.end] = np.arange(slot, slot + each.segment.length)
        anew = each.recomputed(block_size)
        for number in range(each.segment.num_blocks(block_size)):
            begin = number * block_size - each.segment.sink
            if not anew[max(begin, 0) : begin + block_size].all():
                copies.append(CopiedBlock(each.segment, number, each.start + begin, first + number))
        position, slot = each.end, slot + each.segment.length
    slots[position:] = np.arange(slot, slot + prompt_length - position)
    return slots, tuple(copies), slot + prompt_length - position
