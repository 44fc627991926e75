"""Every kernel of kvarn, declared once: its schema, its reference, its fake for tracing, and the function to call.

Tensors go in, tensors come out, without gradients; in-place arguments are named in each docstring. Each op is
`torch.ops.kvarn.NAME`, so torch.compile, fake tensors and profilers see it. Every device runs the torch reference
(`reference.py`) unless a faster version is registered for it: here the native CPU library (`cpu/`, float32 and
bfloat16) is loaded, and the Triton kernels (`triton/`) are where there is CUDA. Arguments that do not fit raise
RuntimeError saying what was got and what was expected; the reference may raise torch's own, and Triton's kernels look
at shapes only.

Shapes: T rows (tokens of all sequences, one after another), S sequences, Hq query heads, Hkv key/value heads (Hq is a
multiple), D head dimension (a multiple of 8), N blocks of B slots, M blocks in the longest block table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvarn.kernels import native, quantized, reference, triton

_library = torch.library.Library("kvarn", "DEF")  # type: ignore[no-untyped-call]


def _declare(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Declare an op, its reference for all devices and its shapes for fake tensors; returns the torch operator."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(name, implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"kvarn::{name}", fake, lib=_library)
    return getattr(torch.ops.kvarn, name).default


def _like_contiguous(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def _nothing(*_: object, **__: object) -> None:
    return None


_paged_attention = _declare(
    "paged_attention(Tensor query, Tensor kv, Tensor slot_positions, Tensor block_tables, Tensor kv_slots, "
    "Tensor query_starts, Tensor positions, float scale, int window=0, float softcap=0.0, Tensor? sinks=None) "
    "-> Tensor",
    reference.paged_attention,
    _like_contiguous,
)
_shared_attention = _declare(
    "shared_attention(Tensor query, Tensor kv, Tensor slot_positions, Tensor block_tables, Tensor kv_slots, "
    "Tensor query_starts, Tensor positions, Tensor view_tables, Tensor view_slots, Tensor row_starts, Tensor rows, "
    "Tensor shifts, Tensor cos_sin, float scale, int window=0, float softcap=0.0, Tensor? sinks=None) -> Tensor",
    reference.shared_attention,
    _like_contiguous,
)
_rms_norm = _declare("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", reference.rms_norm, _like_contiguous)
_add_rms_norm = _declare(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor",
    reference.add_rms_norm,
    _like_contiguous,
)
_rope_and_cache = _declare(
    "rope_and_cache(Tensor(a!) query, Tensor key, Tensor value, Tensor cos_sin, Tensor positions, Tensor(b!) kv, "
    "Tensor slots) -> ()",
    reference.rope_and_cache,
    _nothing,
)
_write_cache = _declare(
    "write_cache(Tensor key, Tensor value, Tensor(a!) kv, Tensor slots) -> ()", reference.write_cache, _nothing
)
_restore_blocks = _declare(
    "restore_blocks(Tensor master, Tensor diffs, Tensor sources, Tensor starts, Tensor targets, Tensor cos_sin, "
    "Tensor(a!) pages) -> ()",
    reference.restore_blocks,
    _nothing,
)
_silu_mul = _declare(
    "silu_mul(Tensor gate_up) -> Tensor",
    reference.silu_mul,
    lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)
_pack_linear = _declare(
    "pack_linear(Tensor weight) -> Tensor",
    reference.pack_linear,
    lambda weight: weight.new_empty((-(-weight.shape[0] // 32), -(-weight.shape[1] // 2), 32, 2)),
)
_packed_linear = _declare(
    "packed_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, bool float32=False) -> Tensor",
    reference.packed_linear,
    lambda x, packed, bias, out_features, float32=False: x.new_empty(
        (x.shape[0], out_features), dtype=torch.float32 if float32 else None
    ),
)
_int_linear = _declare(
    "int_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, int bits, bool float32=False) -> Tensor",
    quantized.int_linear,
    lambda x, packed, bias, out_features, bits, float32=False: x.new_empty(
        (x.shape[0], out_features), dtype=torch.float32 if float32 else None
    ),
)
_largest = _declare(
    "largest(Tensor logits) -> Tensor",
    reference.largest,
    lambda logits: logits.new_empty(logits.shape[:1], dtype=torch.int64),
)
_sample = _declare(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor uniform) -> Tensor",
    reference.sample,
    lambda logits, *_: logits.new_empty(logits.shape[:1], dtype=torch.int64),
)
_token_logprobs = _declare(
    "token_logprobs(Tensor logits, Tensor tokens, int count) -> (Tensor, Tensor, Tensor)",
    reference.token_logprobs,
    lambda logits, tokens, count: (
        logits.new_empty(logits.shape[:1], dtype=torch.float32),
        logits.new_empty((logits.shape[0], count), dtype=torch.int64),
        logits.new_empty((logits.shape[0], count), dtype=torch.float32),
    ),
)

_native = native.load()
_has_triton = triton.register(_library)


def native_kernels() -> str | None:
    """The instruction set of the native CPU kernels in use ("avx512_bf16", "avx512", "avx2", "portable").

    None when CPU tensors run on the reference.
    """
    return _native.selected if _native else None


def has_triton() -> bool:
    """Whether CUDA tensors run on the Triton kernels."""
    return _has_triton


def native_variants() -> tuple[str, ...]:
    """The instruction sets `use_native_variant` takes on this machine, best first; empty without native kernels."""
    return _native.variants if _native else ()


def use_native_variant(name: str) -> None:
    """Run the native kernels of instruction set `name` from now on; ValueError when not in `native_variants()`."""
    if _native is None:
        raise ValueError(f"cannot run {name!r} kernels: no native kernels are loaded")
    _native.select(name)


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
    """Attention of mixed prefill and decode rows over paged keys and values, masked by position.

    query           [T, Hq, D] float32 or bfloat16; rows and heads may be strided, as in a slice of a fused projection
    kv              [N, 2, Hkv, B, D] of the query's dtype: one layer of the pool; dim 0 may be strided. Or an int8
                    cache, [N, 2, Hkv, B * (D + 4)] uint8: the B rows of a block and head as int8, then their B scales
                    (float32): `write_cache` makes each row's largest magnitude 127 scales
    slot_positions  [N, B] int32: position of the token held by each slot, -1 when empty
    block_tables    [S, M] int32: block ids of each sequence in slot order (entries past its slots: any value)
    kv_slots        [S] int32: how many leading slots of its block table each sequence may look at
    query_starts    [S + 1] int32 from 0 to T: rows query_starts[s]:query_starts[s + 1] belong to sequence s
    positions       [T] int32: position of each query row
    scale           factor on the dot products
    window          0, or how many positions back (its own included) a row may look
    softcap         0, or the cap c in c * tanh(logit / c)
    sinks           None, or [Hq] float32 or bfloat16: one more logit a head in the softmax's denominator

    A row at position p attends to every slot among its sequence's first kv_slots whose position q has 0 <= q <= p and,
    with a window, p - q < window; slots may be in any order and have holes. Rows that may look at nothing give zeros.
    Returns [T, Hq, D], contiguous. Weights of bfloat16 inputs are rounded to bfloat16 on processors with AVX512_BF16;
    all sums are float32. With an int8 cache and AVX512_VNNI, a few rows of a sequence (decode) are computed in int8:
    query rows are rounded to 127ths of their largest magnitude, weights to 255ths of the largest of 16 slots.
    """
    return _paged_attention(  # type: ignore[no-any-return]
        query, kv, slot_positions, block_tables, kv_slots, query_starts, positions, scale, window, softcap, sinks
    )


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
    """`paged_attention` in which rows of several sequences also look at shared slots, each at positions of its own.

    view_tables  [V, W] int32: block ids of each view in slot order
    view_slots   [V] int32: how many leading slots of its block table make a view
    row_starts   [V + 1] int32 from 0 to U: entries row_starts[v]:row_starts[v + 1] of `rows` and `shifts` are view v's
    rows         [U] int32: query rows that look at it; a row may be in any number of views
    shifts       [U] int32 in (-P, P): how much further on than in its slot a token stands for that row
    cos_sin      [P, R] float32: what `rope_and_cache` rotated the queries and keys with
    The others as for `paged_attention`.

    For a row at position p and a shift d, a view's slot of position q holds the token of position q + d: it is seen if
    q >= 0, q + d <= p and, with a window, p - q - d < window. Its key is rotated for q, so the row's query is turned
    back by d positions, in float32, and rounded to its dtype. One softmax is over all that a row sees. A view's slots
    are read once for all its rows. Source: arXiv 2402.05099 (Hydragen) joins shared and own parts like this.
    """
    return _shared_attention(  # type: ignore[no-any-return]
        query, kv, slot_positions, block_tables, kv_slots, query_starts, positions, view_tables, view_slots, row_starts,
        rows, shifts, cos_sin, scale, window, softcap, sinks,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x [..., F] of one to three dimensions, all but the last may be strided; weight [F] of x's dtype. Computed in
    float32 and rounded once. Returns x's shape, contiguous.
    """
    return _rms_norm(x, weight, eps)  # type: ignore[no-any-return]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Adds x to `residual` in place (rounded to its dtype) and returns rms_norm(residual, weight, eps).

    x and residual [..., F] of the same shape and dtype, weight [F]; strides as for `rms_norm`.
    """
    return _add_rms_norm(x, residual, weight, eps)  # type: ignore[no-any-return]


def rope_and_cache(
    query: Tensor, key: Tensor, value: Tensor, cos_sin: Tensor, positions: Tensor, kv: Tensor, slots: Tensor
) -> None:
    """Rotary embedding: rotates `query` in place, writes the rotated key and the value into `kv`.

    query      [T, Hq, D], changed in place; rows and heads may be strided, as of key and value
    key, value [T, Hkv, D]; the key itself is left as it is
    cos_sin    [P, R] float32, R <= D even: cosines of position p in its first half, sines in its second
    positions  [T] int32 in [0, P)
    kv         changed in place: one layer of the pool as for `paged_attention`, of key's dtype or int8
    slots      [T] int32: block * B + offset where each row's key and value go, all different

    Element i of the first R / 2 turns with element i + R / 2 ("neox" layout); elements from R on are not rotated.
    """
    _rope_and_cache(query, key, value, cos_sin, positions, kv, slots)


def write_cache(key: Tensor, value: Tensor, kv: Tensor, slots: Tensor) -> None:
    """Writes key and value [T, Hkv, D] without rotation into slots [T] of `kv`; arguments as for `rope_and_cache`."""
    _write_cache(key, value, kv, slots)


def restore_blocks(
    master: Tensor, diffs: Tensor, sources: Tensor, starts: Tensor, targets: Tensor, cos_sin: Tensor, pages: Tensor
) -> None:
    """Puts stored blocks into the pool, keys turned to where they go: one read of a block for all that share it.

    master   [M, L, 2, Hkv, B, D] float32 or bfloat16: blocks that many share; dim 0 may be strided, as of diffs
    diffs    [E, L, 2, Hkv, B, D] of the same dtype: blocks that stand in for some of the master's
    sources  [J] int32: job j restores master[sources[j]], or diffs[~sources[j]] where that is negative
    starts   [J] int32: the block's keys are from before rotary embedding and are turned to positions starts[j],
             starts[j] + 1, ...; or negative: its keys are copied like its values
    targets  [J] int32: the block of `pages` that is written, all different
    cos_sin  [P, R] as for `rope_and_cache`, to the bit; rows of a last block behind position P - 1 are turned as it
    pages    [N, L, 2, Hkv, B, D] of master's dtype or int8, [N, L, 2, Hkv, B * (D + 4)] uint8 as for
             `paged_attention`; dim 0 may be strided. Changed in place

    What is copied keeps its bytes. Some of the layers are restored by slices of master, diffs and pages. On the CPU,
    much is written past the caches.
    """
    _restore_blocks(master, diffs, sources, starts, targets, cos_sin, pages)


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where gate and up are the halves of gate_up [T, 2F]; rows may be strided. Returns [T, F]."""
    return _silu_mul(gate_up)  # type: ignore[no-any-return]


def pack_linear(weight: Tensor) -> Tensor:
    """Lays out a weight [N, K] for `packed_linear`: [ceil(N / 32), ceil(K / 2), 32, 2], filled up with zeros.

    A panel of 32 outputs lies together, each input pair of all 32 side by side.
    """
    return _pack_linear(weight)  # type: ignore[no-any-return]


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, float32: bool = False) -> Tensor:
    """x @ weight.T + bias for a weight [N, K] laid out by `pack_linear`.

    x             [M, K] bfloat16; rows may be strided
    packed        pack_linear(weight), bfloat16
    bias          None, or [N] bfloat16
    out_features  N
    float32       return the float32 sums instead of rounding them

    Returns [M, N], contiguous. Sums are float32, rounded once. On the CPU every output is summed in the same order
    whatever M is: a row gives the same bits alone and among others.
    """
    return _packed_linear(x, packed, bias, out_features, float32)  # type: ignore[no-any-return]


def int_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, bits: int, float32: bool = False
) -> Tensor:
    """x @ weight.T + bias for a weight [N, K] of 8 or 4 bits, laid out by `quantized.pack_int8` or `pack_int4`.

    Rows of x are quantised to int8 in groups of 32 inputs, each with a scale of its own (largest magnitude / 127),
    and multiplied as integers; on a CUDA device they stay as they are. Other arguments, the result and its order of
    sums as for `packed_linear`.
    """
    return _int_linear(x, packed, bias, out_features, bits, float32)  # type: ignore[no-any-return]


def largest(logits: Tensor) -> Tensor:
    """Id of the largest logit of each row of logits [R, V], the lowest id of a tie; rows may be strided. [R] int64."""
    return _largest(logits)  # type: ignore[no-any-return]


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """Draws one token a row, in the order of transformers: temperature, top-k, top-p, min-p, draw. Returns [R] int64.

    logits       [R, V] float32 or bfloat16; rows may be strided
    temperature  [R] float64; 0 takes the largest logit, and the rest is not looked at
    top_k        [R] int64: logits from the k-th largest on are kept; 0, or V and more, keeps all
    top_p        [R] float64 in (0, 1]: of these, logits are kept from the one at which the cumulative probability,
                 most likely first, renormalised after top-k, reaches top_p
    min_p        [R] float64 in [0, 1]: of these, those of at least the largest + temperature * log(min_p)
    uniform      [R] float64 in [0, 1)

    What is kept is what reaches a threshold, so tokens tied with the last one kept are kept too. The token drawn is
    the first at which the cumulative distribution of the kept tokens, in order of their ids, exceeds `uniform`: a pure
    function of the row and its settings. Weights are float32 at least, their sums float64. A row whose largest logit is
    not finite gives some token.
    """
    return _sample(logits, temperature, top_k, top_p, min_p, uniform)  # type: ignore[no-any-return]


def token_logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of logits [R, V] at tokens [R] int64, and the `count` largest of each row.

    Returns float32 [R]; ids int64 and values float32 [R, count], in descending order. logits as for `sample`.
    """
    return _token_logprobs(logits, tokens, count)  # type: ignore[no-any-return]
