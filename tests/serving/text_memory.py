"""Memory that holds texts where KV would be, and says of each token what it was computed behind."""

from __future__ import annotations

import zlib

import numpy as np

from kvarn.serving.engine import Engine
from kvarn.serving.kvcache.prefix import ROOT
from kvarn.serving.request import Request


class TextMemory:
    """Slots of blocks with what a model's KV would tell: the token, its position, and a value that depends on the
    values of all tokens before it that it was computed behind, as KV of any layer but the first does.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.tokens = np.full((num_blocks, block_size), -1, dtype=np.int32)
        self.values = np.zeros((num_blocks, block_size), dtype=np.uint32)
        self.positions = np.full((num_blocks, block_size), -1, dtype=np.int32)

    def slots(self, blocks: list[int], places: np.ndarray) -> np.ndarray:
        """Slots in memory of places in a run of blocks."""
        return np.array(blocks, dtype=np.int64)[places // self.block_size] * self.block_size + places % self.block_size

    def write(self, slots: np.ndarray, tokens: np.ndarray, positions: np.ndarray) -> None:
        self.tokens.reshape(-1)[slots] = tokens
        self.positions.reshape(-1)[slots] = positions

    def look(self, request: Request, used: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots that a request's rows look at, its own and those of segments, and the positions of what they hold."""
        own = self.slots(request.blocks, np.arange(used))
        slots, positions = [own], [self.positions.reshape(-1)[own]]
        for view in request.layout.views if request.layout is not None else ():
            blocks = [view.segment.blocks[number] for number in view.numbers]
            seen = self.slots(blocks, np.arange(len(blocks) * self.block_size))
            seen = seen[self.positions.reshape(-1)[seen] >= 0]
            slots.append(seen)
            positions.append(self.positions.reshape(-1)[seen] + view.shift)
        return np.concatenate(slots), np.concatenate(positions)

    def compute(self, slots: np.ndarray, rows: np.ndarray) -> None:
        """Set the values of `rows`, places in `slots`, rising; `slots` are those of a whole context in its order."""
        values, tokens = self.values.reshape(-1)[slots], self.tokens.reshape(-1)[slots]
        state = before = 0
        for row in rows.tolist():
            state = zlib.crc32(values[before:row].tobytes(), state)
            values[row] = zlib.crc32(tokens[row].tobytes(), state)
            before = row
        self.values.reshape(-1)[slots[rows]] = values[rows]


def check_index(engine: Engine) -> None:
    """Raise AssertionError unless all blocks that a prefix finds hold its tokens, each computed behind its prefix."""
    index, pages = engine.cache.index, engine.executor.pages  # type: ignore[attr-defined]
    states = {ROOT: 0}
    for entry in sorted(index._by_block.values(), key=lambda entry: entry.id):
        state = states.get(entry.parent)
        if state is None:
            continue  # those before it are gone: no prompt finds it
        tokens = np.frombuffer(entry.tokens, dtype=np.int32)
        assert np.array_equal(pages.tokens[entry.block], tokens), f"block {entry.block} holds other tokens"
        for place, token in enumerate(tokens):
            value = np.uint32(zlib.crc32(token.tobytes(), state))
            assert pages.values[entry.block, place] == value, f"block {entry.block} holds KV of another prefix"
            state = zlib.crc32(value.tobytes(), state)
        states[entry.id] = state
