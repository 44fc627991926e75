"""Linear layers with weights of 8 and 4 bits in Triton, on the layout of `kvarn.kernels.quantized`.

Only the weight is quantised here: codes are widened to x's dtype on their way into the product. For a few rows (decode)
that happens inside the product, so memory gives up codes alone; for many, the weight is widened once and the product
is torch's.

A panel of the layout holds 32 outputs. Its codes are read as words of 32 bits, 32 neighbours for the 32 outputs; a
word holds 4 or 8 inputs that follow each other, so a product over words is 4 or 8 products over every fourth or eighth
input.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvarn.kernels.triton.dot import dot

_FEW_ROWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}
"""Rows that are multiplied without widening the weight first; more would not fit into shared memory."""
_GROUP = 32


@triton.jit
def _codes(words, part: tl.constexpr, BITS: tl.constexpr):
    """The codes that lie in each word for its input number `part`, as float32 (`cpu/linear_int.h` has the layout)."""
    if BITS == 8:
        return ((words >> (8 * part)) & 255).to(tl.float32) - 128.0
    return ((words >> (8 * (part % 4) + 4 * (part // 4))) & 15).to(tl.float32)


@triton.jit
def _int_linear(
    x, words, halves, floats, bias, out, rows, x_row, panel_words,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    PER_WORD: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = GROUPS * BITS  # words of one output
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    known = n < OUTPUTS
    panel = (n // 32).to(tl.int64) * panel_words
    x_rows = x + m[:, None].to(tl.int64) * x_row
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, WORDS, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        inside = (w < WORDS)[:, None] & known[None, :]
        if BITS == 8:
            place = panel[None, :] + w[:, None] * 32 + n[None, :] % 32
        else:
            group = panel[None, :] + (w[:, None] // 4) * 160
            place = group + (w[:, None] % 4) * 32 + n[None, :] % 32
            factor = group * 2 + 256 + n[None, :] % 32
            scale = tl.load(halves + factor, mask=inside, other=0.0).to(tl.float32)
            minimum = tl.load(halves + factor + 32, mask=inside, other=0.0).to(tl.float32)
        packed = tl.load(words + place, mask=inside, other=0)
        for part in tl.static_range(PER_WORD):
            k = w * PER_WORD + part
            some_x = tl.load(x_rows + k[None, :], mask=(m < rows)[:, None] & (k < INPUTS)[None, :], other=0.0)
            weight = _codes(packed, part, BITS)
            if BITS == 4:
                weight = weight * scale + minimum
            sums = dot(some_x, weight.to(some_x.dtype), sums, PRECISION)
    if BITS == 8:
        sums *= tl.load(floats + panel + WORDS * 32 + n % 32, mask=known, other=0.0)[None, :]
    if BIAS:
        sums += tl.load(bias + n, mask=known, other=0.0).to(tl.float32)[None, :]
    place = out + m[:, None].to(tl.int64) * OUTPUTS + n[None, :]
    tl.store(place, sums.to(out.dtype.element_ty), mask=(m < rows)[:, None] & known[None, :])


@triton.jit
def _widen(
    words, halves, floats, out, panel_words,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Writes one group of inputs of one panel into a plain weight [OUTPUTS, INPUTS]."""
    PER_WORD: tl.constexpr = 32 // BITS
    panel, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, 32)
    n = panel * 32 + lane
    w = tl.arange(0, BITS)
    start = panel * panel_words
    if BITS == 8:
        place = start + (group * 8 + w[:, None]) * 32 + lane[None, :]
        scale = tl.load(floats + start + GROUPS * 256 + lane)
    else:
        start += group * 160
        place = start + w[:, None] * 32 + lane[None, :]
        scale = tl.load(halves + start * 2 + 256 + lane).to(tl.float32)
        minimum = tl.load(halves + start * 2 + 288 + lane).to(tl.float32)
    packed = tl.load(words + place)
    for part in tl.static_range(PER_WORD):
        k = group * 32 + w * PER_WORD + part
        weight = _codes(packed, part, BITS) * scale[None, :]
        if BITS == 4:
            weight += minimum[None, :]
        inside = (k < INPUTS)[:, None] & (n < OUTPUTS)[None, :]
        tl.store(out + n[None, :] * INPUTS + k[:, None], weight.to(out.dtype.element_ty), mask=inside)


def int_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, bits: int, float32: bool = False
) -> Tensor:
    """See `kvarn.kernels.ops.int_linear`; x, float32 or bfloat16, is not quantised."""
    rows, inputs = x.shape
    groups = triton.cdiv(inputs, _GROUP)
    views = packed.view(torch.int32), packed.view(torch.float16), packed.view(torch.float32)
    panel_words = views[0].shape[1]
    if rows > _FEW_ROWS[x.dtype]:
        weight = torch.empty(out_features, inputs, dtype=x.dtype, device=x.device)
        _widen[(packed.shape[0], groups)](
            *views, weight, panel_words,
            INPUTS=inputs, OUTPUTS=out_features, GROUPS=groups, BITS=bits, num_warps=2,
        )  # fmt: skip
        product = torch.nn.functional.linear(x, weight, bias)
        return product.float() if float32 else product
    out = torch.empty(rows, out_features, dtype=torch.float32 if float32 else x.dtype, device=x.device)
    if rows:
        block_m = max(16, triton.next_power_of_2(rows))
        _int_linear[(triton.cdiv(out_features, 32), 1)](
            x, *views, packed if bias is None else bias, out, rows, x.stride(0), panel_words,
            INPUTS=inputs, OUTPUTS=out_features, GROUPS=groups, BITS=bits, BIAS=bias is not None,
            BLOCK_M=block_m, BLOCK_N=32, BLOCK_W=32, PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return out
