"""A shared segment whose KV is stored: what it is, and where its KV lies."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True, eq=False)
class StoredSegment:
    """Encoded once, alone, behind a few tokens that take the attention which any first tokens get.

    Its blocks begin with the slots of those tokens, its sink, which are empty afterwards: token j of the segment is in
    slot sink + j and was encoded for position sink + j.
    """

    key: bytes
    salt: str
    sink_tokens: NDArray[np.int32]
    tokens: NDArray[np.int32]
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
    def all_tokens(self) -> NDArray[np.int32]:
        """Its sink's and its own."""
        return np.concatenate([self.sink_tokens, self.tokens])

    @property
    def is_encoded(self) -> bool:
        return self.encoded == self.sink + self.length

    def num_blocks(self, block_size: int) -> int:
        return -(-(self.sink + self.length) // block_size)
