"""A shared segment whose KV is stored: what it is, and where its KV lies."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True, eq=False)
class StoredSegment:
    """Encoded once, behind a few tokens that take the attention which any first tokens get.

    Where it is the first to be encoded behind them, its blocks begin with the slots of those tokens, its sink, which
    are empty afterwards: token j of the segment is in slot sink + j, and was encoded for position origin + j.
    """

    key: bytes
    salt: str
    sink_tokens: NDArray[np.int32]
    """Those that its blocks begin with."""
    tokens: NDArray[np.int32]
    before: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    """What it was encoded behind that is not in its blocks: the sink and segments of the same round."""
    blocks: list[int] = field(default_factory=list)
    """Device blocks with its KV; empty: not on the device."""
    canonical: list[int] = field(default_factory=list)
    """Blocks of the segment memory, with keys before rotation."""
    encoded: int = 0
    """Tokens of sink and segment that are encoded so far."""
    pins: int = 0
    """Requests and rounds that use it. While there are any, device blocks and memory stay; each has a reference to
    the device blocks."""

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def sink(self) -> int:
        return len(self.sink_tokens)

    @property
    def origin(self) -> int:
        """The position that its first token was encoded for."""
        return len(self.before) + self.sink

    @property
    def all_tokens(self) -> NDArray[np.int32]:
        """Its sink's and its own."""
        return np.concatenate([self.sink_tokens, self.tokens])

    @property
    def is_encoded(self) -> bool:
        return self.encoded == self.sink + self.length

    def first_positions(self, block_size: int) -> list[int]:
        """The position that each block's first slot stands for."""
        return [self.origin - self.sink + i * block_size for i in range(self.num_blocks(block_size))]

    def num_blocks(self, block_size: int) -> int:
        return -(-(self.sink + self.length) // block_size)
