"""Which rows of a batch look at which shared segments' blocks: rows of all requests on the same blocks go together.

Rows that stand before a segment see nothing of it and are left out.
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
            start = max(view.segment.sink, view.numbers[0] * block_size) + view.shift
            rows = first + np.flatnonzero(positions[first:end] >= start)
            complete = complete and len(rows) == end - first
            if len(rows) == 0:
                continue
            table = tuple(view.segment.blocks[number] for number in view.numbers)
            place = tables.setdefault(table, len(tables))
            if place == len(readers):
                readers.append([])
            readers[place].append((rows, view.shift))
    if not tables:
        return None, complete
    width = max(map(len, tables))
    packed = np.zeros((len(tables), width), dtype=np.int32)
    for table, place in tables.items():
        packed[place, : len(table)] = table
    entries = [entry for group in readers for entry in group]
    starts = np.cumsum([0, *(sum(len(rows) for rows, _ in group) for group in readers)], dtype=np.int32)
    views = SharedViews(
        block_tables=torch.from_numpy(packed),
        kv_slots=torch.tensor([len(table) * block_size for table in tables], dtype=torch.int32),
        row_starts=torch.from_numpy(starts),
        rows=torch.from_numpy(np.concatenate([rows for rows, _ in entries]).astype(np.int32)),
        shifts=torch.from_numpy(np.concatenate([np.full(len(rows), shift, np.int32) for rows, shift in entries])),
    )
    return views, complete
