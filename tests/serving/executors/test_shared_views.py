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


def _segment(first_block: int, behind: int = 0) -> StoredSegment:
    """Encoded behind its own sink, or behind so many tokens that are elsewhere."""
    sink, tokens = np.zeros(0 if behind else SINK, dtype=np.int32), np.ones(LENGTH, dtype=np.int32)
    blocks = [first_block, first_block + 1, first_block + 2]
    before = np.zeros(behind, dtype=np.int32)
    return StoredSegment(b"", "", sink, tokens, before, blocks, encoded=len(sink) + LENGTH)


def _agent(name: str, prompt: int, placed: list[Placed]) -> Request:
    request = make_request(name, [5] * prompt, 8)
    request.layout = lay_out(prompt, placed, SIZE, dense=False)
    request.num_computed = request.layout.reused
    request.add_blocks([sum(name.encode()) + i for i in range(-(-(prompt + 8) // SIZE))])
    return request


def _looks(forward: ForwardBatch) -> dict[int, set[tuple[int, int]]]:
    """Of each row, the blocks that it looks at, and the shifts."""
    views = forward.views
    looks: dict[int, set[tuple[int, int]]] = {row: set() for row in range(len(forward.positions))}
    if views is not None:
        for view, (begin, end) in enumerate(itertools.pairwise(views.row_starts.tolist())):
            blocks = views.block_tables[view, : int(views.kv_slots[view]) // SIZE].tolist()
            for row, shift in zip(views.rows[begin:end].tolist(), views.shifts[begin:end].tolist(), strict=True):
                looks[row] |= {(block, shift) for block in blocks}
    return looks


def _expected(request: Request, position: int) -> set[tuple[int, int]]:
    """The blocks of those of a request's views of which a row sees something."""
    return {
        (view.segment.blocks[number], view.shift)
        for view in (request.layout.views if request.layout is not None else ())
        for number in view.numbers
        if position - view.shift >= view.segment.origin + max(0, view.numbers[0] * SIZE - view.segment.sink)
    }


def _agents() -> list[Request]:
    a, b, c = _segment(100), _segment(200, behind=SINK + LENGTH), _segment(300)
    return [
        _agent("x", 50, [Placed(a, 6), Placed(b, 16), Placed(c, 30, frozenset({0}))]),
        _agent("y", 51, [Placed(c, 3), Placed(a, 25, frozenset({0, 1})), Placed(b, 35)]),
    ]


def _packer() -> Packer:
    return Packer(max_rows=100, max_requests=3, max_context=80, block_size=SIZE, device=torch.device("cpu"))


def test_rows_are_in_the_views_that_they_see_something_of_in_every_step() -> None:
    """Chunks of the same lengths step after step, whose rows pass segments on their way."""
    requests = [*_agents(), make_request("plain", [5] * 60, 8)]
    requests[2].add_blocks(list(range(50, 70)))
    packer, seen = _packer(), []
    while all(request.num_uncomputed >= 3 for request in requests):
        forward = packer.pack(Batch([ScheduledRequest(request, 3, 0) for request in requests]))
        looks = _looks(forward)
        for row, position in enumerate(forward.positions.tolist()):
            assert looks[row] == _expected(requests[row // 3], position)
            seen.append(len(looks[row]))
        for request in requests:
            request.num_computed += 3
    assert 0 in seen and max(seen) == 8


def test_segments_seen_with_the_same_shifts_by_the_same_rows_are_one_view() -> None:
    """Of x alone, a and b, which was encoded behind it; but not when y sees other blocks of a than x."""
    for count, views in ((1, 2), (2, 5)):
        requests = _agents()[:count]
        for request in requests:
            request.num_computed = request.num_tokens - 1
        forward = _packer().pack(Batch([ScheduledRequest(request, 1, 0) for request in requests]))
        assert forward.views is not None and len(forward.views.block_tables) == views
        looks = _looks(forward)
        for row, request in enumerate(requests):
            assert looks[row] == _expected(request, request.num_tokens - 1)
