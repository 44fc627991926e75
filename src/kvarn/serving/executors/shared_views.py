"""Which rows of a batch look at which shared segments' blocks: rows of all requests on the same blocks go together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.models.spec import SharedViews
from kvarn.serving.request import Request


def pack_views(requests: Sequence[Request], query_starts: NDArray[np.int32], block_size: int) -> SharedViews | None:
    """Views of a batch whose request i has the rows query_starts[i] to query_starts[i + 1]; None where nobody has any.

    On the CPU: whoever computes elsewhere sends them there.
    """
    tables: dict[tuple[int, ...], int] = {}
    readers: list[list[tuple[int, int]]] = []
    for i, request in enumerate(requests):
        for view in request.layout.views if request.layout is not None else ():
            table = tuple(view.segment.blocks[number] for number in view.numbers)
            place = tables.setdefault(table, len(tables))
            if place == len(readers):
                readers.append([])
            readers[place].append((i, view.shift))
    if not tables:
        return None
    width = max(map(len, tables))
    packed = np.zeros((len(tables), width), dtype=np.int32)
    for table, place in tables.items():
        packed[place, : len(table)] = table
    rows, shifts, starts = [], [], [0]
    for group in readers:
        for i, shift in group:
            first, end = int(query_starts[i]), int(query_starts[i + 1])
            rows.append(np.arange(first, end, dtype=np.int32))
            shifts.append(np.full(end - first, shift, dtype=np.int32))
        starts.append(starts[-1] + sum(int(query_starts[i + 1] - query_starts[i]) for i, _ in group))
    return SharedViews(
        block_tables=torch.from_numpy(packed),
        kv_slots=torch.tensor([len(table) * block_size for table in tables], dtype=torch.int32),
        row_starts=torch.tensor(starts, dtype=torch.int32),
        rows=torch.from_numpy(np.concatenate(rows)),
        shifts=torch.from_numpy(np.concatenate(shifts)),
    )
