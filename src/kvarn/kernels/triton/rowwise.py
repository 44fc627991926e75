"""Norms, SwiGLU's gate, rotary embedding and cache writes in Triton. See `kvarn.kernels.ops` for their arguments."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["inner"])
def _norm(
    x, residual, weight, out, eps, inner, x_outer, x_inner, residual_outer, residual_inner,
    FEATURES: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first, second = row // inner, row % inner
    i = tl.arange(0, BLOCK)
    inside = i < FEATURES
    value = tl.load(x + first * x_outer + second * x_inner + i, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        place = residual + first * residual_outer + second * residual_inner + i
        value += tl.load(place, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(residual.dtype.element_ty)
        tl.store(place, rounded, mask=inside)
        value = rounded.to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, axis=0) / FEATURES + eps)
    normed *= tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * FEATURES + i, normed.to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normed(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _normed(x, residual, weight, eps)


def _normed(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    features = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    inner = x.shape[1] if x.dim() == 3 else 1
    added = x if residual is None else residual
    block = triton.next_power_of_2(features)
    _norm[(out.numel() // features,)](
        x, added, weight, out, eps, inner, *_row_strides(x), *_row_strides(added),
        FEATURES=features, BLOCK=block, ADD=residual is not None, num_warps=min(8, max(1, block // 512)),
    )  # fmt: skip
    return out


def _row_strides(x: Tensor) -> tuple[int, int]:
    """Strides of all dimensions but the last, filled up to two with zeros."""
    return (x.stride(0) if x.dim() > 1 else 0, x.stride(1) if x.dim() == 3 else 0)


@triton.jit
def _silu_mul(gate_up, out, row_stride, FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < FEATURES
    gate = tl.load(gate_up + row * row_stride + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + FEATURES + i, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * FEATURES + i, result.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    rows, features = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, features, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        block = min(1024, triton.next_power_of_2(features))
        _silu_mul[(rows, triton.cdiv(features, block))](
            gate_up, out, gate_up.stride(0), FEATURES=features, BLOCK=block, num_warps=4
        )
    return out


@triton.jit
def nearest(x):
    """Rounded to the nearest integer, of two the even one: numbers this large have no room for fractions."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def steps_per_unit(largest):
    """127 steps for the largest magnitude of a row."""
    return tl.where(largest > 1e-30, 127.0 / tl.maximum(largest, 1e-30), 0.0)[:, None]


@triton.jit
def _rope_and_cache(
    query, key, value, cos_sin, positions, kv, kv_scales, slots,
    query_row, query_head, key_row, key_head, value_row, value_head, kv_block,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERY_PARTS: tl.constexpr, HEAD_SIZE: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = ROTARY // 2
    i = tl.arange(0, BLOCK_HALF)
    turned = i < half
    if ROTARY > 0:
        angles = cos_sin + tl.load(positions + row).to(tl.int64) * ROTARY + i
        cos = tl.load(angles, mask=turned, other=1.0)[None, :]
        sin = tl.load(angles + half, mask=turned, other=0.0)[None, :]
    if part < QUERY_PARTS:
        if ROTARY > 0:
            head = part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
            turning = (head < HEADS)[:, None] & turned[None, :]
            place = query + row * query_row + head[:, None] * query_head + i[None, :]
            a = tl.load(place, mask=turning, other=0.0).to(tl.float32)
            b = tl.load(place + half, mask=turning, other=0.0).to(tl.float32)
            tl.store(place, (a * cos - b * sin).to(query.dtype.element_ty), mask=turning)
            tl.store(place + half, (b * cos + a * sin).to(query.dtype.element_ty), mask=turning)
    else:
        head = (part - QUERY_PARTS) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        here = (head < KV_HEADS)[:, None]
        slot = tl.load(slots + row).to(tl.int64)
        page = kv + slot // BLOCK_SIZE * kv_block + (slot % BLOCK_SIZE) * HEAD_DIM
        target = page + head[:, None] * HEAD_SIZE
        largest = tl.zeros([BLOCK_HEADS], tl.float32)
        if ROTARY > 0:
            halves = here & turned[None, :]
            source = key + row * key_row + head[:, None] * key_head + i[None, :]
            a = tl.load(source, mask=halves, other=0.0).to(tl.float32)
            b = tl.load(source + half, mask=halves, other=0.0).to(tl.float32)
            first = (a * cos - b * sin).to(key.dtype.element_ty)
            second = (b * cos + a * sin).to(key.dtype.element_ty)
            if INT8:
                first = first.to(tl.float32)
                second = second.to(tl.float32)
                largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
        d = tl.arange(0, BLOCK_D)[None, :]
        if ROTARY < HEAD_DIM:
            tail = here & (d >= ROTARY) & (d < HEAD_DIM)
            rest = tl.load(key + row * key_row + head[:, None] * key_head + d, mask=tail, other=0.0)
            if INT8:
                rest = rest.to(tl.float32)
                largest = tl.maximum(largest, tl.max(tl.abs(rest), axis=1))
        whole = here & (d < HEAD_DIM)
        held = tl.load(value + row * value_row + head[:, None] * value_head + d, mask=whole, other=0.0)
        if INT8:  # behind the rows of a block and head lie their float32 scales
            scales = kv_scales + slot // BLOCK_SIZE * (kv_block // 4) + slot % BLOCK_SIZE
            scales += (head * HEAD_SIZE + BLOCK_SIZE * HEAD_DIM) // 4
            tl.store(scales, largest / 127.0, mask=head < KV_HEADS)
            steps = steps_per_unit(largest)
            if ROTARY > 0:
                first = nearest(first * steps)
                second = nearest(second * steps)
            if ROTARY < HEAD_DIM:
                rest = nearest(rest * steps)
            held = held.to(tl.float32)
            value_largest = tl.max(tl.abs(held), axis=1)
            tl.store(scales + KV_HEADS * HEAD_SIZE // 4, value_largest / 127.0, mask=head < KV_HEADS)
            held = nearest(held * steps_per_unit(value_largest))
        if ROTARY > 0:
            tl.store(target + i[None, :], first.to(kv.dtype.element_ty), mask=halves)
            tl.store(target + i[None, :] + half, second.to(kv.dtype.element_ty), mask=halves)
        if ROTARY < HEAD_DIM:
            tl.store(target + d, rest.to(kv.dtype.element_ty), mask=tail)
        tl.store(target + KV_HEADS * HEAD_SIZE + d, held.to(kv.dtype.element_ty), mask=whole)


def rope_and_cache(
    query: Tensor, key: Tensor, value: Tensor, cos_sin: Tensor, positions: Tensor, kv: Tensor, slots: Tensor
) -> None:
    _write(query, key, value, cos_sin, positions, kv, slots)


def write_cache(key: Tensor, value: Tensor, kv: Tensor, slots: Tensor) -> None:
    _write(None, key, value, None, slots, kv, slots)


def _write(
    query: Tensor | None, key: Tensor, value: Tensor, cos_sin: Tensor | None, positions: Tensor, kv: Tensor,
    slots: Tensor,
) -> None:  # fmt: skip
    """Without query and cos_sin, keys are written as they are."""
    rows, kv_heads, head_dim = key.shape
    if not rows:
        return
    heads = 0 if query is None else query.shape[1]
    rotary = 0 if cos_sin is None else cos_sin.shape[1]
    turned = key if query is None else query
    is_int8 = kv.dtype == torch.uint8
    row_elements = head_dim + 4 if is_int8 else head_dim
    block_size = kv[0, 0, 0].numel() // row_elements
    pages, scales = (kv.view(torch.int8), kv.view(torch.float32)) if is_int8 else (kv, kv)
    block_heads = min(8, triton.next_power_of_2(max(heads, kv_heads)))
    query_parts = triton.cdiv(heads, block_heads)
    _rope_and_cache[(rows, query_parts + triton.cdiv(kv_heads, block_heads))](
        turned, key, value, key if cos_sin is None else cos_sin, positions, pages, scales, slots,
        turned.stride(0), turned.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        kv.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, ROTARY=rotary, BLOCK_SIZE=block_size,
        BLOCK_HEADS=block_heads, BLOCK_HALF=triton.next_power_of_2(max(1, rotary // 2)),
        BLOCK_D=triton.next_power_of_2(head_dim), QUERY_PARTS=query_parts,
        HEAD_SIZE=block_size * row_elements, INT8=is_int8, num_warps=2,
    )  # fmt: skip
