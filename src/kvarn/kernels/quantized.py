"""Weights of 8 and 4 bits: quantising them, laying them out for `ops.int_linear`, and what that op means (reference).

int8: one scale an output; weight = (code - 128) * scale. int4: for every output and 32 inputs a scale and a minimum;
weight = code * scale + minimum, the form of GGUF's Q4_0, Q4_1 and Q4_K blocks.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP: Final = 32
"""Inputs that share a scale: of x in every product, of the weight in int4."""
_PANEL: Final = 32
"""Outputs whose codes lie together."""
_QUADS: Final = GROUP // 4
_TINY: Final = torch.finfo(torch.float16).tiny


class Int4Weight(NamedTuple):
    """A weight [N, K], K a multiple of 32."""

    codes: Tensor
    """[N, K] uint8, 0 to 15."""
    scales: Tensor
    """[N, K / 32] float16"""
    minimums: Tensor
    """[N, K / 32] float16"""

    def dequantized(self) -> Tensor:
        """[N, K] float32."""
        groups = _groups(self.codes.float())
        weight: Tensor = (groups * self.scales.float()[..., None] + self.minimums.float()[..., None]).flatten(1)
        return weight


def _groups(rows: Tensor) -> Tensor:
    """[M, K] -> [M, ceil(K / 32), 32], filled up with zeros."""
    padded = pad(rows, (0, -rows.shape[1] % GROUP))
    return padded.reshape(len(padded), padded.shape[1] // GROUP, GROUP)


def quantize_int4(weight: Tensor) -> Int4Weight:
    """The nearest of 16 evenly spaced values between each group's smallest and largest; K is filled up with zeros."""
    groups = _groups(weight.float())
    low, high = groups.aminmax(dim=2)
    minimums, scales = low.half(), ((high - low) / 15).half()
    steps = (groups - minimums.float()[..., None]) / scales.float().clamp_min(_TINY)[..., None]
    return Int4Weight(steps.round_().clamp_(0, 15).to(torch.uint8).flatten(1), scales, minimums)


def pack_int8(weight: Tensor) -> Tensor:
    """Quantise a weight [N, K] and lay it out: [ceil(N / 32), bytes of a panel] uint8 (`cpu/linear_int.h` says how)."""
    wide = pad(weight.float(), (0, -weight.shape[1] % GROUP, 0, -weight.shape[0] % _PANEL))
    scales = wide.abs().amax(dim=1) / 127
    codes = (wide / scales.clamp_min(_TINY)[:, None]).round_().add_(128).to(torch.uint8)
    panels = codes.view(-1, _PANEL, wide.shape[1] // 4, 4).transpose(1, 2).flatten(1)
    return torch.cat([panels, scales.view(-1, _PANEL).view(torch.uint8)], dim=1)


def pack_int4(weight: Int4Weight) -> Tensor:
    """Lay a weight out: [ceil(N / 32), bytes of a panel] uint8 (`cpu/linear_int.h` says how)."""
    fill = (0, 0, 0, -weight.codes.shape[0] % _PANEL)
    quads = pad(weight.codes, fill).view(-1, _PANEL, weight.scales.shape[1], _QUADS // 2, 2, 4)
    halves = (quads[..., 0, :] | quads[..., 1, :] << 4).permute(0, 2, 3, 1, 4).flatten(2)  # [panels, groups, bytes]
    factors = [
        pad(each, fill).view(-1, _PANEL, each.shape[1]).transpose(1, 2).contiguous().view(torch.uint8)
        for each in (weight.scales, weight.minimums)
    ]
    return torch.cat([halves, *factors], dim=2).flatten(1)


def unpack(packed: Tensor, out_features: int, in_features: int, bits: int) -> Tensor:
    """The weight [N, K] float32 that a layout holds."""
    groups = -(-in_features // GROUP)
    if bits == 8:
        codes, scales = packed[:, : groups * GROUP * _PANEL], packed[:, groups * GROUP * _PANEL :]
        wide = codes.view(-1, groups * _QUADS, _PANEL, 4).transpose(1, 2).flatten(2).flatten(0, 1).float() - 128
        weight = wide * scales.contiguous().view(torch.float32).flatten()[:, None]
    else:
        split = _PANEL * GROUP // 2
        blocks = packed.view(len(packed), groups, -1)
        halves = blocks[..., :split].view(-1, groups, _QUADS // 2, _PANEL, 4).permute(0, 3, 1, 2, 4)
        codes = torch.stack([halves & 15, halves >> 4], dim=4).flatten(2).flatten(0, 1)
        factors = blocks[..., split:].contiguous().view(torch.float16).view(-1, groups, 2, _PANEL)
        scales, minimums = factors.permute(2, 0, 3, 1).flatten(1, 2)
        weight = Int4Weight(codes, scales, minimums).dequantized()
    return weight[:out_features, :in_features]


def quantize_rows(x: Tensor) -> Tensor:
    """Rows of x [M, K] rounded to 255 levels in every group of 32, as float32: what `int_linear` multiplies."""
    groups = _groups(x.float())
    largest = groups.abs().amax(dim=2, keepdim=True)
    by = torch.where(largest > 0, torch.tensor(127.0) / largest, 0)  # 127 / largest would multiply by a reciprocal
    steps = (groups.double() * by.double()).round().float()  # in double, so that the product is rounded once
    rounded: Tensor = (steps * (largest / 127)).flatten(1)[:, : x.shape[1]]
    return rounded


def int_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, bits: int, float32: bool = False
) -> Tensor:
    out = quantize_rows(x) @ unpack(packed, out_features, x.shape[1], bits).T
    out = out if bias is None else out + bias.float()
    return out if float32 else out.to(x.dtype)
