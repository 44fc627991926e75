"""Random paged-attention cases: sequences whose slots are permuted, have holes and empty slots, in a strided pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvarn.kernels import reference

DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class PagedCase:
    """Arguments of `paged_attention`; `options` are those with defaults."""

    tensors: dict[str, Tensor]
    scale: float
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, function: Any, dtype: torch.dtype | None = None) -> Tensor:
        """Call `function`, with floating tensors converted to `dtype` when one is given."""

        def converted(value: Any) -> Any:
            return value.to(dtype) if dtype and isinstance(value, Tensor) and value.is_floating_point() else value

        tensors = {name: converted(value) for name, value in self.tensors.items()}
        options = {name: converted(value) for name, value in self.options.items()}
        out: Tensor = function(**tensors, scale=self.scale, **options)
        return out


@dataclass(frozen=True)
class Sequence:
    """`slots` leading slots of which a share is empty, and `rows` query rows."""

    slots: int
    rows: int


def make_case(
    sequences: list[Sequence],
    *,
    dtype: torch.dtype,
    kv_heads: int,
    group: int,
    head_dim: int,
    block_size: int,
    holes: float,
    permuted: bool,
    fused: bool,
    seed: int,
    options: dict[str, Any],
    int8: bool = False,
) -> PagedCase:
    g = torch.Generator().manual_seed(seed)
    widest = max((s.slots + block_size - 1) // block_size for s in sequences) + 1
    num_blocks = len(sequences) * widest + 2
    layers, layer = 3, 1
    pages = torch.randn(num_blocks, layers, 2, kv_heads, block_size, head_dim, generator=g).to(dtype)
    slot_positions = torch.randint(-1, 50, (num_blocks, block_size), generator=g, dtype=torch.int32)  # stale rubbish
    order = torch.randperm(num_blocks, generator=g).int()
    block_tables = torch.full((len(sequences), widest), 2**30, dtype=torch.int32)
    positions: list[Tensor] = []
    for index, sequence in enumerate(sequences):
        used = (sequence.slots + block_size - 1) // block_size
        blocks = order[index * widest : index * widest + used]
        block_tables[index, :used] = blocks
        # Positions 0, 1, 2, ... where some are missing (holes) and some slots hold nothing.
        at = torch.arange(sequence.slots, dtype=torch.int32)
        at = at + (torch.rand(sequence.slots, generator=g) < holes).int().cumsum(0).int()
        if permuted:
            at = at[torch.randperm(sequence.slots, generator=g)]
        at[torch.rand(sequence.slots, generator=g) < holes] = -1
        flat = slot_positions[blocks.long()].flatten()
        flat[: sequence.slots] = at
        slot_positions[blocks.long()] = flat.view(used, block_size)
        last = int(at.max()) if sequence.slots else 3
        # Rows may sit anywhere: behind, among or before the slots.
        low = max(0, last - sequence.rows - 2) if torch.rand((), generator=g) < 0.7 else 0
        positions.append(
            torch.randint(low, max(last, 0) + 2, (sequence.rows,), generator=g, dtype=torch.int32).sort()[0]
        )
    rows = sum(s.rows for s in sequences)
    heads = kv_heads * group
    if fused:
        query = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, generator=g).to(dtype)
        query = query[:, : heads * head_dim].view(rows, heads, head_dim)
    else:
        query = torch.randn(heads, rows, head_dim, generator=g).to(dtype).transpose(0, 1)
    starts = torch.tensor([0, *torch.tensor([s.rows for s in sequences]).cumsum(0).tolist()], dtype=torch.int32)
    if options.get("sinks"):
        options = options | {"sinks": torch.randn(heads, generator=g)}
    return PagedCase(
        {
            "query": query,
            "kv": int8_pages(pages, slot_positions)[:, layer] if int8 else pages[:, layer],
            "slot_positions": slot_positions,
            "block_tables": block_tables,
            "kv_slots": torch.tensor([s.slots for s in sequences], dtype=torch.int32),
            "query_starts": starts,
            "positions": torch.cat(positions),
        },
        head_dim**-0.5,
        options,
    )


def int8_pages(pages: Tensor, slot_positions: Tensor) -> Tensor:
    """An int8 pool of the same keys and values, whose empty slots have NaN for scales."""
    num_blocks, layers, _, kv_heads, block_size, head_dim = pages.shape
    quantised = torch.zeros(num_blocks, layers, 2, kv_heads, block_size * (head_dim + 4), dtype=torch.uint8)
    slots = torch.arange(num_blocks * block_size, dtype=torch.int32)
    for layer in range(layers):
        key, value = pages[:, layer].permute(1, 0, 3, 2, 4).flatten(1, 2)
        reference.write_cache(key, value, quantised[:, layer], slots)
        _, scales = reference.quantised_kv(quantised[:, layer], head_dim)
        scales[(slot_positions < 0)[:, None, None, :].expand(scales.shape)] = float("nan")
    return quantised


@st.composite
def paged_cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    most_sequences: int = 5,
    most_rows: int = 70,
    int8: bool = False,
) -> PagedCase:
    sequence = st.builds(Sequence, slots=st.integers(0, 150), rows=st.one_of(st.just(1), st.integers(0, most_rows)))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["window"] = draw(st.integers(1, 200))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([1.0, 30.0]))
    if draw(st.booleans()):
        options["sinks"] = True
    return make_case(
        draw(st.lists(sequence, min_size=1, max_size=most_sequences)),
        dtype=draw(st.sampled_from(dtypes)),
        kv_heads=draw(st.integers(1, 4)),
        group=draw(st.sampled_from([1, 2, 3, 4, 7, 8])),
        head_dim=draw(st.one_of(st.sampled_from([64, 80, 96, 128, 256]), st.integers(1, 32).map(lambda n: 8 * n))),
        block_size=draw(st.one_of(st.just(16), st.integers(1, 40))),
        holes=draw(st.sampled_from([0.0, 0.1, 0.9])),
        permuted=draw(st.booleans()),
        fused=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        options=options,
        int8=int8 and draw(st.booleans()),
    )
