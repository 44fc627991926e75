"""Stored blocks of keys and values put into the cache, in Triton. See `kvarn.kernels.ops` for the arguments."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.kernels.triton.rowwise import nearest, steps_per_unit


@triton.jit
def _restore(
    master, diffs, sources, starts, targets, cos_sin, pages, scales, positions, master_block, diffs_block, pages_block,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, KV_HEADS: tl.constexpr, ROTARY: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_D: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    # Jobs are the fastest axis: those that share a block read the same few lines at about the same time.
    job, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ELEMENTS: tl.constexpr = BLOCK_SIZE * HEAD_DIM
    HEAD_SIZE: tl.constexpr = ELEMENTS + 4 * BLOCK_SIZE if INT8 else ELEMENTS
    HALF: tl.constexpr = ROTARY // 2
    source = tl.load(sources + job).to(tl.int64)
    start = tl.load(starts + job)
    block = pages + tl.load(targets + job).to(tl.int64) * pages_block + part * HEAD_SIZE
    if source >= 0:
        head = master + source * master_block + part * ELEMENTS
    else:
        head = diffs + (-1 - source) * diffs_block + part * ELEMENTS
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    here = (row < BLOCK_SIZE)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    i = tl.arange(0, BLOCK_HALF)[None, :]
    turned = tl.where((start >= 0) & (part // KV_HEADS % 2 == 0), ROTARY, 0)  # leading elements of each row
    halves = here & (i < turned // 2)
    kept = here & (d >= turned) & (d < HEAD_DIM)
    rest = tl.load(head + row[:, None] * HEAD_DIM + d, mask=kept, other=0.0)
    angles = cos_sin + tl.minimum(start + row, positions - 1).to(tl.int64)[:, None] * ROTARY + i
    cos = tl.load(angles, mask=halves, other=1.0)
    sin = tl.load(angles + HALF, mask=halves, other=0.0)
    pair = head + row[:, None] * HEAD_DIM + i
    a = tl.load(pair, mask=halves, other=0.0).to(tl.float32)
    b = tl.load(pair + HALF, mask=halves, other=0.0).to(tl.float32)
    first = (a * cos - b * sin).to(master.dtype.element_ty)
    second = (b * cos + a * sin).to(master.dtype.element_ty)
    if INT8:  # behind the rows of a block and head lie their float32 scales
        first = first.to(tl.float32)
        second = second.to(tl.float32)
        rest = rest.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
        largest = tl.maximum(largest, tl.max(tl.abs(rest), axis=1))
        place = scales + tl.load(targets + job).to(tl.int64) * (pages_block // 4) + (part * HEAD_SIZE + ELEMENTS) // 4
        tl.store(place + row, largest / 127.0, mask=row < BLOCK_SIZE)
        steps = steps_per_unit(largest)
        first = nearest(first * steps)
        second = nearest(second * steps)
        rest = nearest(rest * steps)
    target = block + row[:, None] * HEAD_DIM
    tl.store(target + d, rest.to(pages.dtype.element_ty), mask=kept)
    tl.store(target + i, first.to(pages.dtype.element_ty), mask=halves)
    tl.store(target + i + HALF, second.to(pages.dtype.element_ty), mask=halves)


def restore_blocks(
    master: Tensor, diffs: Tensor, sources: Tensor, starts: Tensor, targets: Tensor, cos_sin: Tensor, pages: Tensor
) -> None:
    layers, _, kv_heads, block_size, head_dim = master.shape[1:]
    jobs, parts = sources.shape[0], layers * 2 * kv_heads
    if not jobs or not parts:
        return
    is_int8 = pages.dtype == torch.uint8
    typed, scales = (pages.view(torch.int8), pages.view(torch.float32)) if is_int8 else (pages, pages)
    block_d = triton.next_power_of_2(head_dim)
    rows = min(triton.next_power_of_2(block_size), max(1, 4096 // block_d))
    rotary = cos_sin.shape[1]
    _restore[(jobs, parts, triton.cdiv(block_size, rows))](
        master, diffs, sources, starts, targets, cos_sin, typed, scales, cos_sin.shape[0],
        master.stride(0), diffs.stride(0), pages.stride(0),
        BLOCK_SIZE=block_size, HEAD_DIM=head_dim, KV_HEADS=kv_heads, ROTARY=rotary, ROWS=rows,
        BLOCK_HALF=triton.next_power_of_2(rotary // 2), BLOCK_D=block_d, INT8=is_int8, num_warps=4,
    )  # fmt: skip
