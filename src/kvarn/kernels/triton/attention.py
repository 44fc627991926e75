"""Paged attention in Triton: one program per KV head, tile of query rows and, for long contexts, share of the slots.

The op's arguments and mask are described in `kvarn.kernels.ops.paged_attention`. All that decides the work lies on the
device (rows and slots of each sequence), and the launch depends on shapes alone: nothing waits for the device, and a
launch can be captured in a CUDA graph.

A tile holds rows of one sequence times the query heads that share a KV head, so a key is read once for all of them.
Tiles are numbered so that sequence s starts at `query_starts[s] // rows_per_tile + s`: the numbers need no second pass
over the batch, and a few are left without rows. With several shares ("flash-decoding"), each leaves its running
maximum, sum and unnormalised output, and a second kernel merges them.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.kernels.triton.dot import dot

_LOG2_E = math.log2(math.e)
_SLOTS_PER_SHARE = 256
_MOST_SHARES = 64
_PROGRAMS_PER_PROCESSOR = 2


@triton.jit(do_not_specialize=["sequences", "table_width", "window"])
def _attend(
    query, kv, kv_scales, slot_positions, block_tables, kv_slots, query_starts, positions, sinks,
    out, part_max, part_sum, scale, softcap, window, sequences, table_width, total_rows,
    query_row, query_head, kv_block,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, SCAN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, TRIM: tl.constexpr, SHARED: tl.constexpr,
    HEAD_SIZE: tl.constexpr, INT8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)

    # The sequence of this tile: the last one whose first tile is not behind it.
    each = tl.arange(0, BLOCK_S)
    first_tile = tl.load(query_starts + each, mask=each < sequences, other=0) // ROWS + each
    sequence = tl.sum(((first_tile <= tile) & (each < sequences)).to(tl.int32), axis=0) - 1
    start = tl.load(query_starts + sequence)
    first_row = start + (tile - start // ROWS - sequence) * ROWS
    end_row = tl.load(query_starts + sequence + 1)
    if first_row >= end_row:
        return

    lane = tl.arange(0, BLOCK_M)
    row = first_row + lane // GROUP
    head = kv_head * GROUP + lane % GROUP
    valid = (row < end_row) & (lane < ROWS * GROUP)
    d = tl.arange(0, BLOCK_D)
    in_dim = d < HEAD_DIM
    position = tl.load(positions + row, mask=valid, other=-1)
    q = tl.load(
        query + row[:, None].to(tl.int64) * query_row + head[:, None] * query_head + d[None, :],
        mask=valid[:, None] & in_dim[None, :], other=0.0,
    )  # fmt: skip

    table = block_tables + sequence.to(tl.int64) * table_width
    begin = 0
    stop = tl.load(kv_slots + sequence)
    if SHARED:
        shares = tl.num_programs(2)
        length = tl.cdiv(tl.cdiv(stop, shares), BLOCK_N) * BLOCK_N
        begin = tl.minimum(share * length, stop)
        stop = tl.minimum(stop, begin + length)
    if TRIM:
        # Look at positions alone first: keys and values outside the first and last visible slot are not read.
        highest = tl.max(position, axis=0)
        lowest = 0
        if WINDOW:
            lowest = tl.maximum(tl.min(tl.where(valid, position, 2147483647), axis=0) - window + 1, 0)
        first = stop
        last = begin
        for at in range(begin, stop, SCAN):
            slot = at + tl.arange(0, SCAN)
            inside = slot < stop
            block = tl.load(table + slot // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            held = tl.load(slot_positions + block * BLOCK_SIZE + slot % BLOCK_SIZE, mask=inside, other=-1)
            seen = (held >= lowest) & (held <= highest)
            first = tl.minimum(first, tl.min(tl.where(seen, slot, stop), axis=0))
            last = tl.maximum(last, tl.max(tl.where(seen, slot + 1, begin), axis=0))
        begin = first
        stop = last

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    head_keys = kv + kv_head.to(tl.int64) * HEAD_SIZE
    head_values = head_keys + KV_HEADS * HEAD_SIZE
    # An int8 cache has the float32 scales of a block and head behind its rows.
    head_scales = kv_scales + (kv_head * HEAD_SIZE + BLOCK_SIZE * HEAD_DIM) // 4
    for at in range(begin, stop, BLOCK_N):
        slot = at + tl.arange(0, BLOCK_N)
        inside = slot < stop
        block = tl.load(table + slot // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        offset = slot % BLOCK_SIZE
        held = tl.load(slot_positions + block * BLOCK_SIZE + offset, mask=inside, other=-1)
        place = block * kv_block + offset * HEAD_DIM
        k = tl.load(head_keys + place[None, :] + d[:, None], mask=inside[None, :] & in_dim[:, None], other=0.0)
        v = tl.load(head_values + place[:, None] + d[None, :], mask=inside[:, None] & in_dim[None, :], other=0.0)
        if INT8:
            k = k.to(tl.float32).to(q.dtype)
            v = v.to(tl.float32).to(q.dtype)
        logits = dot(q, k, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION) * scale
        if INT8:
            scales = head_scales + block * (kv_block // 4) + offset
            logits *= tl.load(scales, mask=inside, other=0.0)[None, :]
        if SOFTCAP:  # tanh(x) = 1 - 2 / (exp(2 x) + 1), right at both infinities
            logits = softcap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * 1.4426950408889634) / softcap) + 1.0))
        visible = (held >= 0)[None, :] & (held[None, :] <= position[:, None])
        if WINDOW:
            visible = visible & (position[:, None] - held[None, :] < window)
        logits = tl.where(visible, logits * 1.4426950408889634, float("-inf"))
        # A slot nobody sees may hold anything, even NaN, which a weight of zero does not silence.
        someone_sees = tl.max(visible.to(tl.int32), axis=0) > 0
        v = tl.where(someone_sees[:, None], v, 0.0)
        new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(logits - shift[:, None])
        shrink = tl.exp2(maximum - shift)
        total = total * shrink + tl.sum(weights, axis=1)
        if INT8:
            value_scales = tl.load(scales + KV_HEADS * HEAD_SIZE // 4, mask=inside & someone_sees, other=0.0)
            weights *= value_scales[None, :]
        weighted = dot(weights.to(v.dtype), v, weighted * shrink[:, None], PRECISION)
        maximum = new_maximum

    heads = KV_HEADS * GROUP
    if SHARED:
        line = (share.to(tl.int64) * total_rows + row) * heads + head
        tl.store(part_max + line, maximum, mask=valid)
        tl.store(part_sum + line, total, mask=valid)
        tl.store(out + line[:, None] * HEAD_DIM + d[None, :], weighted, mask=valid[:, None] & in_dim[None, :])
    else:
        if SINKS:
            sink = tl.load(sinks + head, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
            shift = tl.maximum(maximum, sink)
            shrink = tl.exp2(maximum - shift)
            weighted = weighted * shrink[:, None]
            total = total * shrink + tl.exp2(sink - shift)
        result = weighted / tl.where(total > 0, total, 1.0)[:, None]
        line = row.to(tl.int64) * heads + head
        tl.store(
            out + line[:, None] * HEAD_DIM + d[None, :], result.to(out.dtype.element_ty),
            mask=valid[:, None] & in_dim[None, :],
        )  # fmt: skip


@triton.jit(do_not_specialize=["shares"])
def _merge(
    part_out, part_max, part_sum, sinks, out, shares, lines,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SHARES: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    share = tl.arange(0, SHARES)
    maxima = tl.load(part_max + share * lines + line, mask=share < shares, other=float("-inf"))
    sums = tl.load(part_sum + share * lines + line, mask=share < shares, other=0.0)
    highest = tl.max(maxima, axis=0)
    sink = float("-inf")
    if SINKS:
        sink = tl.load(sinks + line % HEADS).to(tl.float32) * 1.4426950408889634
        highest = tl.maximum(highest, sink)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(sums * tl.exp2(maxima - shift), axis=0)
    if SINKS:
        total += tl.exp2(sink - shift)
    d = tl.arange(0, BLOCK_D)
    result = tl.zeros([BLOCK_D], tl.float32)
    for one in range(shares):
        at = one * lines + line
        part = tl.load(part_out + at * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
        result += part * tl.exp2(tl.load(part_max + at) - shift)
    result = result / tl.where(total > 0, total, 1.0)
    tl.store(out + line * HEAD_DIM + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)


def paged_attention(
    query: Tensor,
    kv: Tensor,
    slot_positions: Tensor,
    block_tables: Tensor,
    kv_slots: Tensor,
    query_starts: Tensor,
    positions: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `kvarn.kernels.ops.paged_attention`."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if not len(query):
        return out
    batch = (query, kv, slot_positions, block_tables, kv_slots, query_starts, positions)
    parts = attend(*batch, scale, window, softcap, sinks, out)
    if parts.shares > 1:
        rows, heads, head_dim = query.shape
        block_d = max(16, triton.next_power_of_2(head_dim))
        _merge[(rows * heads,)](
            parts.sums, parts.maxima, parts.totals, parts.maxima if sinks is None else sinks, out, parts.shares,
            rows * heads,
            HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=block_d, SHARES=triton.next_power_of_2(parts.shares),
            SINKS=sinks is not None, num_warps=1 if block_d <= 128 else 2,
        )  # fmt: skip
    return out


class Parts(NamedTuple):
    """What rows saw in each share of their slots: unnormalised sums, maxima (in units of log2), sums of weights."""

    sums: Tensor
    """[shares, T, Hq, D]"""
    maxima: Tensor
    """[shares, T, Hq]"""
    totals: Tensor
    """[shares, T, Hq]"""

    @property
    def shares(self) -> int:
        return self.maxima.shape[0]


def attend(
    query: Tensor,
    kv: Tensor,
    slot_positions: Tensor,
    block_tables: Tensor,
    kv_slots: Tensor,
    query_starts: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    out: Tensor | None,
) -> Parts:
    """Parts of the attention of one or more rows. One share alone is finished and written to `out`, if there is one."""
    rows, heads, head_dim = query.shape
    sequences, table_width = block_tables.shape
    kv_heads, block_size = kv.shape[2], slot_positions.shape[1]
    group = heads // kv_heads
    wide = query.dtype == torch.float32
    is_int8 = kv.dtype == torch.uint8
    pages, scales = (kv.view(torch.int8), kv.view(torch.float32)) if is_int8 else (kv, kv)
    block_d = max(16, triton.next_power_of_2(head_dim))
    # Few rows a sequence (decode): the smallest tile that tensor cores take. Otherwise one that a prompt fills.
    lanes = 16 if rows * group <= 16 * sequences or wide or block_d > 128 else 64
    lanes = max(lanes, triton.next_power_of_2(group))
    tile_rows = lanes // group
    slots = 32 if wide or block_d > 128 else 64
    tiles = rows // tile_rows + sequences
    shares = _count_shares(tiles * kv_heads, table_width * block_size, query.device)
    sums = out if out is not None and shares == 1 else query.new_empty((shares, *query.shape), dtype=torch.float32)
    maxima, totals = torch.empty(2, shares, rows, heads, dtype=torch.float32, device=query.device)
    _attend[(tiles, kv_heads, shares)](
        query, pages, scales, slot_positions, block_tables.contiguous(), kv_slots, query_starts, positions,
        maxima if sinks is None else sinks, sums, maxima, totals,
        scale, softcap, window, sequences, table_width, rows,
        query.stride(0), query.stride(1), kv.stride(0),
        KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, ROWS=tile_rows,
        BLOCK_M=lanes, BLOCK_N=slots, BLOCK_D=block_d, BLOCK_S=max(64, triton.next_power_of_2(sequences)), SCAN=1024,
        WINDOW=window > 0, SOFTCAP=softcap > 0, SINKS=sinks is not None,
        TRIM=window > 0 or rows > sequences, SHARED=sums is not out,
        HEAD_SIZE=block_size * (head_dim + 4 if is_int8 else head_dim), INT8=is_int8,
        PRECISION="ieee" if wide else "tf32",
        num_warps=4, num_stages=2 if wide or block_d > 128 else 3,
    )  # fmt: skip
    return Parts(sums, maxima, totals)


def _count_shares(programs: int, capacity_slots: int, device: torch.device) -> int:
    """Into how many shares the slots of each sequence are cut: enough to fill the device, none too short."""
    wanted = _PROGRAMS_PER_PROCESSOR * _processors(device) // programs
    return max(1, min(wanted, capacity_slots // _SLOTS_PER_SHARE, _MOST_SHARES))


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; on the CPU, where only Triton's interpreter runs, a number that tests the shares."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16
