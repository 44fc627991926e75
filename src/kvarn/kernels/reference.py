"""Readable torch versions of every op in `ops.py`: what the native kernels are held to, and what runs without them.

They take the same arguments, work for any floating dtype on any device, and compute in float32. They are written to
be read: one sequence at a time, gathers instead of pointers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    seen = _seen(
        query, kv, slot_positions, block_tables, kv_slots, query_starts, positions, scale, window, softcap
    )  # fmt: skip
    return _finished(seen, sinks, query.dtype)


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
    """A row and what it sees of a view of shift d are a row d positions before it and the view as it stands."""
    options = (scale, window, softcap)
    own = _seen(query, kv, slot_positions, block_tables, kv_slots, query_starts, positions, *options)
    rows = rows.long()
    turned = _turned_back(query[rows], shifts, cos_sin)
    viewed = _seen(
        turned, kv, slot_positions, view_tables, view_slots, row_starts, positions[rows] - shifts, *options
    )  # fmt: skip
    maxima = own.maxima.scatter_reduce(0, rows[:, None].expand(viewed.maxima.shape), viewed.maxima, "amax")
    finite = maxima.clamp(min=torch.finfo(maxima.dtype).min)
    keep, add = (own.maxima - finite).exp(), (viewed.maxima - finite[rows]).exp()
    totals = (own.totals * keep).index_add(0, rows, viewed.totals * add)
    sums = (own.sums * keep[..., None]).index_add(0, rows, viewed.sums * add[..., None])
    return _finished(_Seen(sums, maxima, totals), sinks, query.dtype)


class _Seen(NamedTuple):
    """What rows saw, before it is divided by the sum of weights: weights are exp(logit - maximum)."""

    sums: Tensor
    """[T, Hq, D]: of weighted values"""
    maxima: Tensor
    """[T, Hq]: -inf for a row that saw nothing"""
    totals: Tensor
    """[T, Hq]: of weights"""


def _seen(
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
) -> _Seen:
    block_size = slot_positions.shape[1]
    num_heads, num_kv_heads = query.shape[1], kv.shape[2]
    sums = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
    maxima, totals = sums[..., 0].clone().fill_(float("-inf")), sums[..., 0].clone()
    starts = query_starts.tolist()
    for sequence, num_slots in enumerate(kv_slots.tolist()):
        rows = slice(starts[sequence], starts[sequence + 1])
        if rows.start == rows.stop or not num_slots:
            continue
        slots = torch.arange(num_slots, device=kv.device)
        blocks, offsets = block_tables[sequence].long()[slots // block_size], slots % block_size
        key = _rows(kv, 0, blocks, offsets, query.shape[2])  # [slots, Hkv, D]
        value = _rows(kv, 1, blocks, offsets, query.shape[2])
        visible = _visible(positions[rows], slot_positions[blocks, offsets], window)  # [rows, slots]

        grouped = query[rows].float().reshape(-1, num_kv_heads, num_heads // num_kv_heads, query.shape[2])
        logits = torch.einsum("rkgd,skd->rkgs", grouped, key) * scale
        if softcap > 0:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~visible[:, None, None, :], float("-inf"))
        highest = logits.amax(-1, keepdim=True)
        # Of rows that may look at nothing all logits are -inf: they weigh nothing.
        weights = (logits - highest.clamp(min=torch.finfo(logits.dtype).min)).exp()
        # A slot nobody sees may hold anything, even NaN, which a weight of zero does not silence.
        value = value.masked_fill(~visible.any(0)[:, None, None], 0.0)
        sums[rows] = torch.einsum("rkgs,skd->rkgd", weights, value).flatten(1, 2)
        maxima[rows], totals[rows] = highest.flatten(1), weights.sum(-1).flatten(1)
    return _Seen(sums, maxima, totals)


def _finished(seen: _Seen, sinks: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Weighted means, with a sink in the denominator if there are some. Rows that saw nothing give zeros."""
    totals = seen.totals
    if sinks is not None:
        totals = totals + (sinks.float() - seen.maxima).exp()  # infinite for such rows
    return (seen.sums / totals.masked_fill(totals == 0.0, 1.0)[..., None]).to(dtype)


def _turned_back(query: Tensor, shifts: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotated query rows [U, Hq, D] as of `shifts` positions before theirs."""
    # At position 0 all angles are 0: its cosines are the factor that the table was made with.
    cos, sin = (cos_sin[shifts.abs().long()] / cos_sin[0].chunk(2)[0].repeat(2)).chunk(2, dim=-1)
    return _rotated(query, torch.cat([cos, sin * -shifts.sign()[:, None]], dim=-1).unsqueeze(1))


def _rows(kv: Tensor, which: int, blocks: Tensor, offsets: Tensor, head_dim: int) -> Tensor:
    """Keys (`which` 0) or values (1) of some slots as float32."""
    if kv.dtype != torch.uint8:
        return kv[blocks, which, :, offsets].float()
    codes, scales = quantised_kv(kv, head_dim)
    return codes[blocks, which, :, offsets].float() * scales[blocks, which, :, offsets, None]


def quantised_kv(kv: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """What an int8 cache [N, 2, Hkv, B * (D + 4)] holds, as views: int8 [N, 2, Hkv, B, D], float32 [N, 2, Hkv, B]."""
    block_size = kv.shape[3] // (head_dim + 4)
    codes = kv[..., : block_size * head_dim].view(torch.int8).view(*kv.shape[:3], block_size, head_dim)
    return codes, kv[..., block_size * head_dim :].view(torch.float32)


def _visible(row_positions: Tensor, slot_positions: Tensor, window: int) -> Tensor:
    distance = row_positions[:, None] - slot_positions[None, :]
    visible = (slot_positions >= 0)[None, :] & (distance >= 0)
    return visible & (distance < window) if window > 0 else visible


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(x.dtype).contiguous()


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    residual.copy_(x.float() + residual.float())
    return rms_norm(residual, weight, eps)


def rope_and_cache(
    query: Tensor, key: Tensor, value: Tensor, cos_sin: Tensor, positions: Tensor, kv: Tensor, slots: Tensor
) -> None:
    angles = cos_sin[positions.long()].unsqueeze(1)  # [T, 1, R]
    query.copy_(_rotated(query, angles))
    write_cache(_rotated(key, angles), value, kv, slots)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    rotary = angles.shape[-1]
    cos, sin = angles.chunk(2, dim=-1)
    first, second = x[..., :rotary].float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated.to(x.dtype), x[..., rotary:]], dim=-1)


def write_cache(key: Tensor, value: Tensor, kv: Tensor, slots: Tensor) -> None:
    head_dim = key.shape[2]
    block_size = kv.shape[3] // (head_dim + 4) if kv.dtype == torch.uint8 else kv.shape[3]
    blocks, offsets = slots.long() // block_size, slots.long() % block_size
    for which, rows in enumerate((key, value)):
        if kv.dtype == torch.uint8:
            codes, scales = quantised_kv(kv, head_dim)
            codes[blocks, which, :, offsets], scales[blocks, which, :, offsets] = _quantised(rows.float())
        else:
            kv[blocks, which, :, offsets] = rows


def restore_blocks(
    master: Tensor, diffs: Tensor, sources: Tensor, starts: Tensor, targets: Tensor, cos_sin: Tensor, pages: Tensor
) -> None:
    block_size = master.shape[4]
    offsets = torch.arange(block_size, device=pages.device)
    jobs = zip(sources.tolist(), starts.tolist(), targets.tolist(), strict=True)
    for source, start, target in jobs:
        block = master[source] if source >= 0 else diffs[~source]  # [L, 2, Hkv, B, D]
        key, value = block.unbind(1)
        if start >= 0:
            key = _rotated(key, cos_sin[(start + offsets).clamp(max=cos_sin.shape[0] - 1)])
        if pages.dtype != torch.uint8:
            pages[target] = torch.stack([key, value], dim=1)
            continue
        codes, scales = quantised_kv(pages[target], block.shape[-1])
        codes[:], scales[:] = _quantised(torch.stack([key, value], dim=1).float())


def _quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Each row in 127ths of its largest magnitude, and what a 127th is worth. Rows of (next to) nothing give zeros."""
    largest = rows.abs().amax(-1)
    factor = torch.where(largest > 1e-30, 127 / largest, 0.0)
    return (rows * factor[..., None]).round().to(torch.int8), largest / 127


def silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def pack_linear(weight: Tensor) -> Tensor:
    outputs, inputs = weight.shape
    padded = torch.nn.functional.pad(weight, (0, inputs % 2, 0, -outputs % 32))
    panels = padded.view(padded.shape[0] // 32, 32, padded.shape[1] // 2, 2)
    return panels.transpose(1, 2).contiguous()


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, float32: bool = False) -> Tensor:
    weight = packed.transpose(1, 2).flatten(2).flatten(0, 1)[:out_features, : x.shape[1]]  # [N, K]
    out = x.float() @ weight.float().T
    out = out if bias is None else out + bias.float()
    return out if float32 else out.to(x.dtype)


def largest(logits: Tensor) -> Tensor:
    return logits.argmax(dim=1)


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    width = logits.shape[1]
    greedy = temperature == 0.0
    ordered = logits.float().sort(dim=1, descending=True).values
    heat = temperature.where(~greedy, 1.0)[:, None]

    def weights(values: Tensor) -> Tensor:
        return ((values.double() - ordered[:, :1].double()) / heat).exp()

    last = torch.where(top_k > 0, top_k.clamp(max=width) - 1, width - 1)
    threshold = ordered.gather(1, last[:, None])
    mass = weights(ordered).masked_fill_(ordered < threshold, 0.0)
    before = mass.cumsum(dim=1) - mass
    within = before < (top_p * mass.sum(dim=1))[:, None]
    nucleus = ordered.gather(1, (within.sum(dim=1, keepdim=True) - 1).clamp_(min=0))
    threshold = torch.where(top_p[:, None] < 1.0, torch.maximum(threshold, nucleus), threshold).double()
    threshold = torch.maximum(threshold, ordered[:, :1].double() + heat * min_p.log()[:, None])
    cumulative = weights(logits).masked_fill_(logits.double() < threshold, 0.0).cumsum(dim=1)
    # right=True: the first token whose cumulative weight exceeds the target, so never one without weight.
    drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    return torch.where(greedy, logits.argmax(dim=1), drawn.clamp_(max=width - 1))


def token_logprobs(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.double().log_softmax(dim=1).float()
    top = logprobs.topk(count, dim=1)
    return logprobs.gather(1, tokens[:, None]).squeeze(1), top.indices, top.values
