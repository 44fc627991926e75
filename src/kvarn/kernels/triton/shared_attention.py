"""Attention to own and shared slots in Triton. See `kvarn.kernels.ops.shared_attention` for the arguments.

Rows that look at a view are rows of one more sequence, with their queries turned back: paged attention leaves what they
and the batch's own rows saw unfinished, and one program for each row and head joins them. As there, the launches depend
on shapes alone and nothing waits for the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.kernels.triton import attention


@triton.jit
def _turn_back(
    query, rows, shifts, cos_sin, out, query_row, query_head,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = ROTARY // 2
    shift = tl.load(shifts + entry)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    source = query + tl.load(rows + entry).to(tl.int64) * query_row + head * query_head
    target = out + (entry * HEADS + head) * HEAD_DIM
    i = tl.arange(0, BLOCK_HALF)[None, :]
    turned = i < half
    # At position 0 all angles are 0: its cosines are the factor that the table was made with.
    factor = tl.load(cos_sin + i, mask=turned, other=1.0)
    angles = cos_sin + tl.abs(shift).to(tl.int64) * ROTARY + i
    cos = tl.load(angles, mask=turned, other=1.0) / factor
    sin = tl.load(angles + half, mask=turned, other=0.0) / factor
    sin = tl.where(shift < 0, -sin, sin)
    inside = turned & (head < HEADS)
    first = tl.load(source + i, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + i, (first * cos + second * sin).to(out.dtype.element_ty), mask=inside)
    tl.store(target + half + i, (second * cos - first * sin).to(out.dtype.element_ty), mask=inside)
    if ROTARY < HEAD_DIM:
        d = tl.arange(0, BLOCK_D)[None, :]
        rest = (d >= ROTARY) & (d < HEAD_DIM) & (head < HEADS)
        tl.store(target + d, tl.load(source + d, mask=rest, other=0.0), mask=rest)


@triton.jit
def _added(maximum, total, weighted, sums, maxima, totals, line, d, HEAD_DIM: tl.constexpr):
    """One more part of a row and head; maximum and total are repeated for every element."""
    part = tl.load(maxima + line)
    highest = tl.maximum(maximum, part)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    keep, add = tl.exp2(maximum - shift), tl.exp2(part - shift)
    values = tl.load(sums + line * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
    return highest, total * keep + tl.load(totals + line) * add, weighted * keep + values * add


@triton.jit(do_not_specialize=["shares", "turned_shares", "lines", "turned_lines"])
def _join(
    sums, maxima, totals, turned_sums, turned_maxima, turned_totals, starts, turns, sinks, out,
    shares, turned_shares, lines, turned_lines,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    row, head = line // HEADS, line % HEADS
    d = tl.arange(0, BLOCK_D)
    maximum = tl.full([BLOCK_D], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    weighted = tl.zeros([BLOCK_D], tl.float32)
    if SINKS:
        maximum = tl.zeros([BLOCK_D], tl.float32) + tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total += 1.0
    for share in range(shares):
        maximum, total, weighted = _added(
            maximum, total, weighted, sums, maxima, totals, share * lines + line, d, HEAD_DIM
        )  # fmt: skip
    for entry in range(tl.load(starts + row), tl.load(starts + row + 1)):
        turned = tl.load(turns + entry).to(tl.int64) * HEADS + head
        for share in range(turned_shares):
            maximum, total, weighted = _added(
                maximum, total, weighted, turned_sums, turned_maxima, turned_totals, share * turned_lines + turned, d,
                HEAD_DIM,
            )  # fmt: skip
    result = weighted / tl.where(total > 0, total, 1.0)
    tl.store(out + line * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)


def shared_attention(
    query: Tensor,
    kv: Tensor,
    slot_positions: Tensor,
    block_tables: Tensor,
    kv_slots: Tensor,
    query_starts: Tensor,
    positions: Tensor,
    view_tables: Tensor,
    view_slots: Tensor,
    row_starts: Tensor,
    rows: Tensor,
    shifts: Tensor,
    cos_sin: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    batch = (query, kv, slot_positions, block_tables, kv_slots, query_starts, positions)
    if not len(rows):
        return attention.paged_attention(*batch, scale, window, softcap, sinks)
    turned = _turned_back(query, rows, shifts, cos_sin)
    own = attention.attend(*batch, scale, window, softcap, None, None)
    viewed = attention.attend(
        turned, kv, slot_positions, view_tables, view_slots, row_starts, positions[rows] - shifts, scale, window,
        softcap, None, None,
    )  # fmt: skip
    # The entries of each row, one row after another.
    in_order, turns = rows.sort(stable=True)
    starts = torch.searchsorted(in_order, torch.arange(len(query) + 1, dtype=torch.int32, device=rows.device))
    count, heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _join[(count * heads,)](
        *own, *viewed, starts, turns, own.maxima if sinks is None else sinks, out,
        own.shares, viewed.shares, count * heads, len(rows) * heads,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)), SINKS=sinks is not None,
        num_warps=1,
    )  # fmt: skip
    return out


def _turned_back(query: Tensor, rows: Tensor, shifts: Tensor, cos_sin: Tensor) -> Tensor:
    heads, head_dim = query.shape[1:]
    out = torch.empty(len(rows), heads, head_dim, dtype=query.dtype, device=query.device)
    rotary = cos_sin.shape[1]
    _turn_back[(len(rows),)](
        query, rows, shifts, cos_sin, out, query.stride(0), query.stride(1),
        HEADS=heads, HEAD_DIM=head_dim, ROTARY=rotary, BLOCK_HEADS=triton.next_power_of_2(heads),
        BLOCK_HALF=triton.next_power_of_2(rotary // 2), BLOCK_D=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip
    return out
