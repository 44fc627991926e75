"""Draws tokens from logits: temperature, truncation (top-k, top-p, min-p) and the inverse of the distribution function.

In: logits [R, V] and per-row settings; out: one token id per row. A draw is a pure function of the row, its
settings and one uniform number, and the uniform is a hash of (seed, output index): nothing depends on which
other rows are in the batch.

Every truncation keeps the tokens whose logit reaches a threshold, in the order transformers applies them:
temperature; top-k: the k-th largest logit; top-p: the logit at which the cumulative probability (most likely
first, renormalised after top-k) reaches p; min-p: the largest logit + log(min_p). Tokens tied with the last one
kept are kept too, so the kept set does not depend on how a sort breaks ties. The cumulative distribution that is
inverted runs over the kept tokens in order of their ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK = 256
"""Tokens summed together in the first level of the search in a row's cumulative distribution."""
_LANE = 32
"""Tokens of which only the largest is looked at first when the top of a row is searched."""
_WIDTHS = (64, 256)
"""Candidates looked at per row before the whole row is."""
_WHOLE_ROWS = 4
"""Whole rows searched at a time on a CPU, whose caches the search's tables should not leave."""
_DIGITS = ((21, 11), (10, 11), (0, 10))
"""Shift and width of the digits that the whole-row search splits a 32-bit key into."""
_BELOW_ONE = 1.0 - 2.0**-52


def uniforms(seeds: NDArray[np.uint64], indexes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) from (seed, output index), by the finaliser of splitmix64 applied to either in turn."""
    mixed = _mix(_mix(seeds) + indexes)
    # 52 bits: the largest number times any total still rounds to less than the total.
    return (mixed >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + np.uint64(0x9E3779B97F4A7C15)  # array arithmetic wraps, as the hash wants
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@dataclass(frozen=True)
class Truncation:
    """Which tokens of each row may be drawn: top_k [R] int64 (0 keeps all), top_p [R] and min_p [R] float64."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def rows(self, index: Tensor) -> Truncation:
        return Truncation(self.top_k[index], self.top_p[index], self.min_p[index])


def largest(logits: Tensor) -> Tensor:
    """Id of each row's largest logit [R], the lowest id of a tie."""
    count, vocab = logits.shape
    if logits.device.type != "cpu" or vocab % _LANE:
        return logits.argmax(dim=1)
    # On a CPU amax is vectorised and argmax is not: find the run that holds the maximum, then its place in the run.
    runs = logits.view(count, vocab // _LANE, _LANE)
    run = runs.amax(dim=2).argmax(dim=1)
    return run * _LANE + runs[torch.arange(count), run].argmax(dim=1)


def draw(scaled: Tensor, uniform: Tensor) -> Tensor:
    """One token per row of `scaled` [R, V] (logits over temperature, float32; overwritten), by `uniform` [R] float64.

    The distribution function is inverted in two levels, sums of chunks and then one chunk, because a cumulative
    sum over the whole row is several times as slow as a sum.
    """
    width = scaled.shape[1]
    weights = torch.softmax(scaled, dim=1, out=scaled)
    whole = width // _CHUNK * _CHUNK
    masses = weights[:, :whole].view(len(weights), -1, _CHUNK).sum(dim=2)
    if whole < width:
        masses = torch.cat([masses, weights[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    chunk, within = _invert(masses, uniform)
    tokens = chunk[:, None] * _CHUNK + torch.arange(_CHUNK, device=scaled.device)
    inside = weights.gather(1, tokens.clamp(max=width - 1)).masked_fill_(tokens >= width, 0.0)
    return chunk * _CHUNK + _invert(inside, within)[0]


def _invert(masses: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Bins [R] in which `uniform` of the rows' total mass falls, and how far into its bin, from 0 to below 1."""
    cumulative = masses.double().cumsum(dim=1)
    target = (uniform * cumulative[:, -1])[:, None]
    # right=True: the first bin whose cumulative mass exceeds the target, so never one without mass. The clamp
    # matters only to rows of NaN, which then give some token instead of an index outside the vocabulary.
    bins = torch.searchsorted(cumulative, target, right=True).clamp_(max=masses.shape[1] - 1)
    mass = masses.double().gather(1, bins)
    within = (target - (cumulative.gather(1, bins) - mass)) / mass
    return bins.squeeze(1), within.squeeze(1).nan_to_num(0.0).clamp(0.0, _BELOW_ONE)


def draw_truncated(scaled: Tensor, truncation: Truncation, uniform: Tensor) -> Tensor:
    """As `draw`, from the tokens that `truncation` keeps; `scaled` [R, V] is left as it is.

    Rows are settled by their few largest logits where these hold everything kept, else by the whole row.
    """
    count, vocab = scaled.shape
    tokens = torch.empty(count, dtype=torch.int64, device=scaled.device)
    totals = _totals(scaled, truncation)
    pending = torch.arange(count, device=scaled.device)
    for width in _WIDTHS:
        if not int(truncation.top_k.min()) < width <= vocab // _LANE // 4:
            continue
        rows = scaled if len(pending) == count else scaled[pending]
        values, ids = _largest(rows, width)
        threshold, settled = _threshold(values.double(), totals[pending], truncation.rows(pending))
        chosen = _draw_candidates(values[settled], ids[settled], threshold[settled], uniform[pending[settled]])
        tokens[pending[settled]] = chosen
        pending = pending[~settled]
        if not len(pending):
            return tokens
    for slab in torch.split(pending, _WHOLE_ROWS if scaled.device.type == "cpu" else count):
        tokens[slab] = draw(_truncate(scaled[slab], truncation.rows(slab)), uniform[slab])
    return tokens


def _totals(scaled: Tensor, truncation: Truncation) -> Tensor:
    """log of the sum of exp over each row [R] float64, where top-p without top-k needs it; elsewhere 0."""
    totals = torch.zeros(len(scaled), dtype=torch.float64, device=scaled.device)
    needed = ((truncation.top_k == 0) & (truncation.top_p < 1.0)).nonzero().squeeze(1)
    if len(needed):
        rows = scaled if len(needed) == len(scaled) else scaled[needed]
        # softmax is one fused pass and its largest entry is exp(maximum - total): twice as fast as logsumexp.
        totals[needed] = (rows.amax(dim=1) - torch.softmax(rows, dim=1).amax(dim=1).log()).double()
    return totals


def _largest(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest logits of each row in descending order [R, width], and their ids.

    They lie in the `width` lanes with the largest maxima, or past the last lane, and lanes are far fewer than tokens:
    a selection over whole rows is what makes the obvious torch.topk slow on a CPU.
    """
    vocab = rows.shape[1]
    lanes = vocab // _LANE
    # Lane j holds ids j, j + lanes, j + 2 * lanes, ...: the maximum over them is then a vectorised one.
    maxima = rows[:, : lanes * _LANE].view(len(rows), _LANE, lanes).amax(dim=1)
    best = maxima.topk(width, dim=1, sorted=False).indices
    offsets = torch.arange(_LANE, device=rows.device) * lanes
    rest = torch.arange(lanes * _LANE, vocab, device=rows.device).expand(len(rows), -1)
    ids = torch.cat([(best[:, :, None] + offsets).flatten(1), rest], dim=1)
    top = rows.gather(1, ids).topk(width, dim=1)
    return top.values, ids.gather(1, top.indices)


def _threshold(values: Tensor, totals: Tensor, limits: Truncation) -> tuple[Tensor, Tensor]:
    """Smallest logit kept [R], and whether `values` [R, W] (descending, float64) surely hold all that is kept [R]."""
    lowest = torch.full_like(totals, -torch.inf)
    width = values.shape[1]
    kth = values.gather(1, (limits.top_k.clamp(1, width) - 1)[:, None]).squeeze(1)
    k_threshold = torch.where(limits.top_k > 0, kth, lowest)
    in_k = values.masked_fill(values < k_threshold[:, None], -torch.inf)
    totals = torch.where(limits.top_k > 0, torch.logsumexp(in_k, dim=1), totals)
    mass = torch.exp(in_k - totals[:, None])
    before = mass.cumsum(dim=1) - mass
    last = ((before < limits.top_p[:, None]).sum(dim=1) - 1).clamp(min=0)
    p_threshold = torch.where(limits.top_p < 1.0, values.gather(1, last[:, None]).squeeze(1), lowest)
    m_threshold = values[:, 0] + torch.log(limits.min_p)  # log(0) = -inf keeps all
    threshold = torch.maximum(torch.maximum(k_threshold, p_threshold), m_threshold)
    # The smallest candidate being left out says that nothing below it, seen or not, is kept. With a top-k it must be
    # left out by that already: top-p's masses are shares of everything top-k keeps, ties included.
    settled = values[:, -1] < torch.where(limits.top_k > 0, k_threshold, threshold)
    return threshold, settled


def _draw_candidates(values: Tensor, ids: Tensor, threshold: Tensor, uniform: Tensor) -> Tensor:
    """One of the candidates that reach the threshold per row [R], the cumulative distribution running in id order."""
    ids, order = ids.sort(dim=1)
    logits = values.double().gather(1, order)
    kept = logits.masked_fill(logits < threshold[:, None], -torch.inf)
    position = _invert(torch.softmax(kept, dim=1), uniform)[0]
    return ids.gather(1, position[:, None]).squeeze(1)


def _truncate(scaled: Tensor, limits: Truncation) -> Tensor:
    """Every row of `scaled` with -inf for what is not kept, in place, by looking at all of it."""

    def drop_below(threshold: Tensor, applies: Tensor) -> None:
        scaled.masked_fill_((scaled < threshold[:, None]) & applies[:, None], -torch.inf)

    if bool((limits.top_k > 0).any()):
        drop_below(_weighted_threshold(scaled, torch.ones_like(scaled), limits.top_k), limits.top_k > 0)
    if bool((limits.top_p < 1.0).any()):
        drop_below(_weighted_threshold(scaled, scaled.softmax(dim=1), limits.top_p), limits.top_p < 1.0)
    drop_below(scaled.amax(dim=1).double() + torch.log(limits.min_p), limits.min_p > 0.0)
    return scaled


def _weighted_threshold(values: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """Smallest value [R] with weight of its own for which the weight of all larger ones is below `target` [R].

    A radix select: float32 bits, made to order as integers, are settled digit by digit, each by a histogram of the
    weights whose higher digits are settled. Linear in the row, where a sort takes milliseconds.
    """
    bits = values.contiguous().view(torch.int32)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF) ^ -(2**31)  # read as unsigned, keys order as the values do
    weights = weights.double()
    prefix = torch.zeros(len(values), 1, dtype=torch.int64, device=values.device)
    above = torch.zeros(len(values), 1, dtype=torch.float64, device=values.device)
    for shift, width in _DIGITS:
        digits = ((keys >> shift) & (2**width - 1)).long()
        histogram = torch.zeros(len(values), 2**width, dtype=torch.float64, device=values.device)
        histogram.scatter_add_(1, digits, weights)
        larger = above + histogram.flip(1).cumsum(dim=1).flip(1) - histogram
        digit = ((histogram > 0) & (larger < target[:, None])).int().argmax(dim=1, keepdim=True)
        above = larger.gather(1, digit)
        prefix = (prefix << width) | digit
        weights = torch.where(digits == digit, weights, 0.0)
    signed = (prefix - 2**31).int()
    return (signed ^ ((signed >> 31) & 0x7FFFFFFF)).view(torch.float32).squeeze(1)
