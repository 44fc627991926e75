"""Views of a batch: each row is in those of which it sees something, step after step."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from kvarn.models.spec import ForwardBatch
from kvarn.serving.batch import Batch, ScheduledRequest
from kvarn.serving.executors.packing import Packer
from kvarn.serving.request import Request
from kvarn.serving.rounds.layout import Placed, lay_out
from kvarn.serving.rounds.segment import StoredSegment
from tests.serving.paged_text import make_request

SIZE, SINK, LENGTH = 4, 2, 10  # segments of three blocks


def _segment(first_block: int) -> StoredSegment:
    sink, tokens = np.zeros(SINK, dtype=np.int32), np.ones(LENGTH, dtype=np.int32)
    blocks = [first_block, first_block + 1, first_block + 2]
    return StoredSegment(b"", "", sink, tokens, blocks, encoded=SINK + LENGTH)


def _agent(name: str, prompt: int, placed: list[Placed]) -> Request:
    request = make_request(name, [5] * prompt, 8)
    request.layout = lay_out(prompt, placed, SIZE, dense=False)
    request.num_computed = request.layout.reused
    request.add_blocks([sum(name.encode()) + i for i in range(-(-(prompt + 8) // SIZE))])
    return request


def _looks(forward: ForwardBatch) -> dict[int, set[tuple[int, int]]]:
    """Of each row, the views' first blocks and shifts."""
    views = forward.views
    looks: dict[int, set[tuple[int, int]]] = {row: set() for row in range(len(forward.positions))}
    if views is not None:
        starts = views.row_starts.tolist()
        for view, (begin, end) in enumerate(itertools.pairwise(starts)):
            for row, shift in zip(views.rows[begin:end].tolist(), views.shifts[begin:end].tolist(), strict=True):
                looks[row].add((int(views.block_tables[view, 0]), shift))
    return looks


def _first_positions(request: Request) -> dict[tuple[int, int], int]:
    """Where the first token of each of a request's views stands."""
    assert request.layout is not None
    return {
        (view.segment.blocks[view.numbers[0]], view.shift): max(SINK, view.numbers[0] * SIZE) + view.shift
        for view in request.layout.views
    }


def test_rows_are_in_the_views_that_they_see_something_of_in_every_step() -> None:
    """Chunks of the same lengths step after step, whose rows pass segments on their way."""
    a, b = _segment(100), _segment(200)
    requests = [
        _agent("x", 40, [Placed(a, 6), Placed(b, 20, frozenset({0}))]),
        _agent("y", 41, [Placed(b, 3), Placed(a, 25, frozenset({0, 1}))]),
        make_request("plain", [5] * 60, 8),
    ]
    requests[2].add_blocks(list(range(50, 70)))
    packer = Packer(max_rows=100, max_requests=3, max_context=80, block_size=SIZE, device=torch.device("cpu"))
    seen = []
    while all(request.num_uncomputed >= 3 for request in requests):
        forward = packer.pack(Batch([ScheduledRequest(request, 3, 0) for request in requests]))
        looks = _looks(forward)
        for row, position in enumerate(forward.positions.tolist()):
            request = requests[row // 3]
            stands = _first_positions(request) if request.layout is not None else {}
            assert looks[row] == {view for view, first in stands.items() if position >= first}
            seen.append(len(looks[row]))
        for request in requests:
            request.num_computed += 3
    assert set(seen) == {0, 1, 2}
