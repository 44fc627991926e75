"""What the members of a round have as keys and values, in one frame: requests in, token rows of each segment out.

The frame is keys before rotation, so what members have in common can be told by its bytes wherever it stands. A row
that a request has in blocks of its own was written rotated. If the stored row, rotated for that place, has the same
bits, it is the stored one; else it is turned back, in float32, and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.kernels import ops
from kvarn.models.decoder_llama import LlamaDecoder
from kvarn.models.spec import ForwardBatch, KVMemory
from kvarn.serving.engine import Engine
from kvarn.serving.executors.segments import TorchSegments
from kvarn.serving.kvcache.mirror_family import MemberCache
from kvarn.serving.request import Request
from kvarn.serving.rounds.layout import Placed
from kvarn.simulation.rounds.progress import Ask

Rows = NDArray[np.int16]
"""[tokens, L, 2, Hkv, D]: bits of bfloat16."""


@dataclass(frozen=True)
class Taken:
    """Of one member."""

    private: Rows
    """Of what stands before the first shared segment, as it is in the pool."""
    segments: Mapping[str, Rows]
    """By the segment's id."""
    sinks: Mapping[str, int]
    """Slots before a segment's first token in its blocks."""

    @property
    def shared_tokens(self) -> int:
        return sum(map(len, self.segments.values()))

    def member(self, name: str, block_size: int, private_share: float = 0.0) -> MemberCache:
        """As the mirror store takes it, in blocks of any size; so much of it is the member's own."""
        wanted = round(private_share / (1.0 - private_share) * self.shared_tokens)
        keys, blocks = [], []
        for id, rows, sink in (
            *((id, rows, self.sinks[id]) for id, rows in self.segments.items()),
            *([(f"of {name}", self.private[:wanted], 0)] if wanted else []),
        ):
            made = _blocks(rows, sink, block_size)
            keys += [(id, number) for number in range(len(made))]
            blocks.append(made)
        return MemberCache(tuple(keys), np.concatenate(blocks))


def take_member(engine: Engine, ask: Ask, request: Request) -> Taken:
    """Of a request with a layout, or of one in a round whose text is computed exactly."""
    if engine.rounds is None or request.layout is None:
        return _computed(engine, ask)
    executor = engine.rounds.executor
    assert isinstance(executor, TorchSegments)
    layout = request.layout
    ids = {start: id for id, start, _ in _spans(ask)}
    private = _own_rows(executor.kv, request, layout.slots[: layout.prefix])
    segments = {ids[each.start]: _bits(_segment_rows(executor, request, each)) for each in layout.placed}
    return Taken(_bits(private), segments, {ids[each.start]: each.segment.sink for each in layout.placed})


def likeness(members: Sequence[Taken], block_size: int) -> NDArray[np.float64]:
    """[L] Of the blocks that two members have in common, how many are byte for byte the same; mean of all pairs."""
    blocks = [{id: _blocks(rows, each.sinks[id], block_size) for id, rows in each.segments.items()} for each in members]
    shares = []
    for one, other in combinations(blocks, 2):
        same = [(one[id] == other[id]).all(axis=(2, 3, 4, 5)) for id in one if id in other]
        if same:
            shares.append(np.concatenate(same).mean(axis=0))
    mean: NDArray[np.float64] = np.mean(shares, axis=0)
    return mean


def _segment_rows(executor: TorchSegments, request: Request, placed: Placed) -> torch.Tensor:
    """[tokens, L, 2, Hkv, D] of one segment where it stands in a request."""
    segment, layout, size = placed.segment, request.layout, executor.block_size
    assert layout is not None
    inside = slice(segment.sink, segment.sink + segment.length)
    canonical = executor.memory[segment.canonical]
    stored = _by_token(canonical)[inside].clone()
    own = np.flatnonzero(placed.recomputed(size)) if layout.views else np.arange(segment.length)
    if not len(own):
        return stored
    rotated = torch.empty_like(canonical)
    numbers = torch.arange(len(canonical), dtype=torch.int32)
    starts = numbers * size + placed.start - segment.sink
    ops.restore_blocks(canonical, canonical[:0], numbers, starts, numbers, executor.decoder.cos_sin, rotated)
    expected = _by_token(rotated)[inside][own]
    found = _own_rows(executor.kv, request, layout.slots[placed.start + own])
    differs = (found.view(torch.int16) != expected.view(torch.int16)).flatten(3).any(dim=3)[..., None, None]
    back = found.clone()
    back[:, :, 0] = _turned_back(found[:, :, 0], executor.decoder.cos_sin[torch.from_numpy(placed.start + own)])
    stored[own] = torch.where(differs, back, stored[own])
    return stored


def _own_rows(kv: KVMemory, request: Request, slots: NDArray[np.int32]) -> torch.Tensor:
    """[len(slots), L, 2, Hkv, D] of slots in the request's own blocks."""
    numbers, offsets = np.divmod(slots, kv.slot_positions.shape[1])
    blocks = torch.from_numpy(request.block_table[numbers].astype(np.int64))
    return kv.pages[blocks, :, :, :, torch.from_numpy(offsets.astype(np.int64))]


def _turned_back(keys: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """[n, L, Hkv, D] keys as before rotation; `cos_sin` [n, D] of their positions."""
    cos, sin = (part[:, None, None].float() for part in cos_sin.chunk(2, dim=1))
    one, other = keys.float().chunk(2, dim=-1)
    return torch.cat([one * cos + other * sin, other * cos - one * sin], dim=-1).to(keys.dtype)


def _computed(engine: Engine, ask: Ask) -> Taken:
    """What exact prefill gives, the whole prompt at once."""
    decoder: Any = engine.executor.decoder  # type: ignore[attr-defined]
    assert isinstance(decoder, LlamaDecoder)
    size, count = 16, len(ask.prompt)
    shape, element = decoder.spec.kv_block(size, decoder.spec.dtype)
    blocks = -(-count // size)
    kv = KVMemory(torch.zeros((blocks, *shape), dtype=element), torch.full((blocks, size), -1, dtype=torch.int32))
    kv.place(list(range(blocks)), [size * i for i in range(blocks)])
    kv.slot_positions.view(-1)[count:] = -1
    places = torch.arange(count, dtype=torch.int32)
    batch = ForwardBatch(
        tokens=torch.from_numpy(ask.prompt.astype(np.int64)), positions=places, slots=places,
        block_tables=torch.arange(blocks, dtype=torch.int32)[None], kv_slots=torch.tensor([count], dtype=torch.int32),
        query_starts=torch.tensor([0, count], dtype=torch.int32), logit_rows=torch.empty(0, dtype=torch.int64),
    )  # fmt: skip
    keys, values = decoder.encode(batch, kv)
    rows = torch.stack([keys, values], dim=1).permute(2, 0, 1, 3, 4)  # [T, L, 2, Hkv, D]
    spans = _spans(ask)
    segments = {id: _bits(rows[start:end]) for id, start, end in spans}
    return Taken(_bits(rows[: spans[0][1]]), segments, dict.fromkeys(segments, 0))


def _spans(ask: Ask) -> list[tuple[str, int, int]]:
    """Id, begin and end of all shared parts."""
    ends = np.cumsum([len(part.tokens) for part in ask.parts]).tolist()
    return [
        (part.id, end - len(part.tokens), end)
        for part, end in zip(ask.parts, ends, strict=True)
        if part.kind == "shared"
    ]


def _blocks(rows: Rows, sink: int, block_size: int) -> Rows:
    """[blocks, L, 2, Hkv, block_size, D], the first rows behind `sink` empty slots; no block is empty."""
    sink %= block_size
    count = -(-(sink + len(rows)) // block_size)
    padded = np.zeros((count * block_size, *rows.shape[1:]), dtype=rows.dtype)
    padded[sink : sink + len(rows)] = rows
    return np.ascontiguousarray(padded.reshape(count, block_size, *rows.shape[1:]).transpose(0, 2, 3, 4, 1, 5))


def _by_token(blocks: torch.Tensor) -> torch.Tensor:
    """[n, L, 2, Hkv, B, D] -> [n * B, L, 2, Hkv, D]"""
    return blocks.permute(0, 4, 1, 2, 3, 5).flatten(0, 1)


def _bits(rows: torch.Tensor) -> Rows:
    bits: Rows = rows.contiguous().view(torch.int16).numpy().copy()
    return bits
