"""Random cases of attention with views: the sequences of `tests.kernels.paged`, and slots that rows see from afar."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.paged import DTYPES, PagedCase, Sequence, make_case

TABLE_POSITIONS = 200
OWN = ("block_tables", "kv_slots", "query_starts")


def cos_sin(rotary: int, factor: float = 1.0, positions: int = TABLE_POSITIONS) -> Tensor:
    """[positions, rotary]; `factor` is on cosines and sines, as YaRN's is."""
    frequencies = 100.0 ** -(torch.arange(rotary // 2) * 2 / rotary)
    angles = torch.outer(torch.arange(positions), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1) * factor


def make_shared_case(
    sequences: list[Sequence], views: list[int], *, most_viewers: int, rotary: int, factor: float, seed: int,
    **shape: Any,
) -> PagedCase:  # fmt: skip
    """`views` are their slots; each has up to `most_viewers` rows that look at it, the same row even twice."""
    g = torch.Generator().manual_seed(seed)
    case = make_case([*sequences, *(Sequence(slots, 0) for slots in views)], seed=seed, **shape)
    tensors, count = case.tensors, len(sequences)
    tables, slots = tensors["block_tables"], tensors["kv_slots"]
    tensors |= {"block_tables": tables[:count], "kv_slots": slots[:count]}
    tensors["query_starts"] = tensors["query_starts"][: count + 1]
    batch_rows = len(tensors["query"])
    viewers = [int(torch.randint(0, most_viewers + 1, (), generator=g)) if batch_rows else 0 for _ in views]
    entries = sum(viewers)
    tensors |= {
        "view_tables": tables[count:],
        "view_slots": slots[count:],
        "row_starts": torch.tensor([0, *torch.tensor(viewers).cumsum(0).tolist()], dtype=torch.int32),
        "rows": torch.randint(0, max(batch_rows, 1), (entries,), generator=g, dtype=torch.int32),
        "shifts": torch.randint(-150, 150, (entries,), generator=g, dtype=torch.int32),
        "cos_sin": cos_sin(rotary, factor),
    }
    return case


@st.composite
def shared_cases(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES, most_rows: int = 40, int8: bool = False
) -> PagedCase:
    sequence = st.builds(Sequence, slots=st.integers(0, 100), rows=st.one_of(st.just(1), st.integers(0, most_rows)))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 150))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([1.0, 30.0]))
    if draw(st.booleans()):
        options["sinks"] = True
    head_dim = draw(st.sampled_from([8, 40, 64, 80, 128]))
    return make_shared_case(
        draw(st.lists(sequence, min_size=1, max_size=4)),
        draw(st.lists(st.integers(0, 120), max_size=3)),
        most_viewers=draw(st.sampled_from([2, 8, most_rows])),
        rotary=draw(st.sampled_from([head_dim, head_dim // 2])),
        factor=draw(st.sampled_from([1.0, 1.2])),
        dtype=draw(st.sampled_from(dtypes)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 3, 8])),
        head_dim=head_dim,
        block_size=draw(st.sampled_from([16, 16, 4, 5])),
        holes=draw(st.sampled_from([0.0, 0.1, 0.9])),
        permuted=draw(st.booleans()),
        fused=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        options=options,
        int8=int8 and draw(st.booleans()),
    )
