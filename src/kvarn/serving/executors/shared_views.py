"""Which rows of a batch look at which shared segments' blocks: rows of all requests on the same blocks go together.

Rows that stand before a segment see nothing of it and are left out. Segments that the same rows see with the same
shifts (encoded behind one another, told in that order) are one view.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.models.spec import SharedViews
from kvarn.serving.request import Request


def pack_views(
    requests: Sequence[Request], query_starts: NDArray[np.int32], positions: NDArray[np.int32], block_size: int
) -> tuple[SharedViews | None, bool]:
    """Views of a batch whose request i has the rows query_starts[i] to query_starts[i + 1]; None where nobody has any.

    Also returns whether every row is in all views of its request: then these hold when `positions` have moved on.
    On the CPU: whoever computes elsewhere sends them there.
    """
    tables: dict[tuple[int, ...], int] = {}
    readers: list[list[tuple[NDArray[np.intp], int]]] = []
    complete = True
    for i, request in enumerate(requests):
        first, end = int(query_starts[i]), int(query_starts[i + 1])
        for view in request.layout.views if request.layout is not None else ():
            segment = view.segment
            start = segment.origin + max(0, view.numbers[0] * block_size - segment.sink) + view.shift
            rows = first + np.flatnonzero(positions[first:end] >= start)
            complete = complete and len(rows) == end - first
            if len(rows) == 0:
                continue
            table = tuple(segment.blocks[number] for number in view.numbers)
            place = tables.setdefault(table, len(tables))
            if place == len(readers):
                readers.append([])
            readers[place].append((rows, view.shift))
    if not tables:
        return None, complete
    joined: dict[tuple[bytes, bytes], list[int]] = {}
    for table, group in zip(tables, readers, strict=True):
        rows = np.concatenate([rows for rows, _ in group]).astype(np.int32)
        shifts = np.concatenate([np.full(len(rows), shift, dtype=np.int32) for rows, shift in group])
        joined.setdefault((rows.tobytes(), shifts.tobytes()), []).extend(table)
    packed = np.zeros((len(joined), max(map(len, joined.values()))), dtype=np.int32)
    for place, blocks in enumerate(joined.values()):
        packed[place, : len(blocks)] = blocks
    entries = [np.frombuffer(rows, dtype=np.int32) for rows, _ in joined]
    views = SharedViews(
        block_tables=torch.from_numpy(packed),
        kv_slots=torch.tensor([len(blocks) * block_size for blocks in joined.values()], dtype=torch.int32),
        row_starts=torch.tensor([0, *np.cumsum([len(rows) for rows in entries])], dtype=torch.int32),
        rows=torch.from_numpy(np.concatenate(entries)),
        shifts=torch.from_numpy(np.concatenate([np.frombuffer(shifts, dtype=np.int32) for _, shifts in joined])),
    )
    return views, complete
