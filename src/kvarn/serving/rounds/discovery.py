"""Finds the texts that prompts of a round have in common, where nobody says what they are.

In go the tokens of the prompts, and of segments that are stored; out come spans of each prompt, apart from one another,
whose tokens stand in two prompts or more, or are a stored segment. There are no separators: a window of `shortest`
tokens is moved over all prompts, hashes find windows that are equal, and tokens are compared before anything counts.

A run of such windows is cut where two places that it stands in go on differently, so that it is the same tokens in
all of them. Where runs overlap, as they do by less than a window, that of more prompts is taken first, then that of
more places, then the longer one; the others are shortened, alike in all places. What comes out depends on the tokens
alone, not on the order of prompts.

Source: rolling hashes after Karp and Rabin (1987); the cuts are the unitigs of a de Bruijn graph, as in the assembly of
genomes. TokenDance (arXiv 2604.03143), 4.1, has separators instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvarn.serving.rounds.spans import Span

Tokens = NDArray[np.int32]
WindowHash = Callable[[Tokens, int], NDArray[np.uint64]]
"""Of tokens and a width w, [tokens - w + 1] hashes of the w tokens from each place on."""

_BASE = 0x9E3779B97F4A7C15
_MIXER = 0xD6E8FEB86659FD93


def rolling_hash(tokens: Tokens, width: int) -> NDArray[np.uint64]:
    """Polynomials in an odd base modulo 2**64: differences of running sums, divided by the power they begin with."""
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(_MIXER)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(_MIXER)
    sums = np.zeros(len(tokens) + 1, dtype=np.uint64)
    np.cumsum(mixed * _powers(_BASE, len(tokens)), out=sums[1:])
    windows: NDArray[np.uint64] = sums[width:] - sums[:-width]
    return windows * _powers(pow(_BASE, -1, 2**64), len(windows))


def discover(
    prompts: Sequence[Tokens],
    stored: Sequence[Tokens] = (),
    *,
    behind: Sequence[int] = (),
    shortest: int = 32,
    hash: WindowHash = rolling_hash,
) -> list[list[Span]]:
    """Of each prompt, the spans that are reusable, in their order.

    stored     texts that count though they stand in one prompt alone; they are taken before all others
    behind     of each prompt, leading tokens to leave alone: what all begin with is a prefix; none by default
    shortest   tokens of a span at least, two or more
    """
    found: list[list[Span]] = [[] for _ in prompts]
    behind = behind or [0] * len(prompts)
    text = _join([prompt[begin:] for prompt, begin in zip(prompts, behind, strict=True)], shortest, hash)
    taken = bytearray(len(text.tokens))
    chosen = _take_stored(text, taken, stored, shortest, hash)
    for starts, length in _repeated_runs(text, shortest):
        chosen += _take(starts, length, text.owners, taken, shortest)
    for start, end in chosen:
        owner = int(text.owners[start])
        offset = behind[owner] - int(text.begins[owner])
        found[owner].append(Span(start + offset, end + offset))
    return [sorted(spans) for spans in found]


def keep_common(prompts: Sequence[Tokens], spans: Sequence[Sequence[Span]], *, always: bool) -> list[list[Span]]:
    """Of the spans of prompts, those whose tokens all have; without `always`, if they are half of all or more."""
    texts = [[prompt[start:end].tobytes() for start, end in own] for prompt, own in zip(prompts, spans, strict=True)]
    common = set.intersection(*map(set, texts))
    kept = [
        [span for span, text in zip(*each, strict=True) if text in common] for each in zip(spans, texts, strict=True)
    ]
    lengths = [sum(span.length for own in some for span in own) for some in (spans, kept)]
    return kept if always or 2 * lengths[1] >= lengths[0] else [list(own) for own in spans]


class _Text(NamedTuple):
    """Prompts one behind the other, and the windows in them."""

    tokens: Tokens
    begins: NDArray[np.int64]
    """[prompts]"""
    owners: NDArray[np.int64]
    """[tokens] whose they are."""
    labels: NDArray[np.int64]
    """[tokens + 1] which window begins at each place; -1: none that is all in one prompt."""
    values: NDArray[np.uint64]
    """[labels] hashes, rising."""
    order: NDArray[np.int64]
    """Places of windows, by label."""
    firsts: NDArray[np.int64]
    """[labels + 1] where in `order` those of each label begin."""


def _join(texts: Sequence[Tokens], shortest: int, hash: WindowHash) -> _Text:
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    ends = np.cumsum(lengths)
    tokens = np.concatenate([*texts, np.empty(0, dtype=np.int32)])
    owners = np.repeat(np.arange(len(texts)), lengths)
    hashes = hash(tokens, shortest) if len(tokens) >= shortest else np.empty(0, dtype=np.uint64)
    places = np.flatnonzero(np.arange(len(hashes)) + shortest <= ends[owners[: len(hashes)]])
    order = places[np.argsort(hashes[places], kind="stable")]
    is_new = np.ones(len(order), dtype=np.bool_)
    is_new[1:] = hashes[order[1:]] != hashes[order[:-1]]
    firsts = np.append(np.flatnonzero(is_new), len(order))
    labels = np.full(len(tokens) + 1, -1, dtype=np.int64)
    labels[order] = np.cumsum(is_new) - 1
    return _Text(tokens, ends - lengths, owners, labels, hashes[order[firsts[:-1]]], order, firsts)


def _take_stored(
    text: _Text, taken: bytearray, stored: Sequence[Tokens], shortest: int, hash: WindowHash
) -> list[tuple[int, int]]:
    """Take the places of stored texts, longest first: found by their first windows, and compared."""
    unique = {each.tobytes(): each for each in stored if len(each) >= shortest}
    if not unique or not len(text.values):
        return []
    known = [unique[content] for content in sorted(unique, key=lambda content: (-len(content), content))]
    firsts = hash(np.concatenate([each[:shortest] for each in known]), shortest)[::shortest]
    labels = np.minimum(np.searchsorted(text.values, firsts), len(text.values) - 1)
    chosen: list[tuple[int, int]] = []
    for i in np.flatnonzero(text.values[labels] == firsts).tolist():
        for start in text.order[text.firsts[labels[i]] : text.firsts[labels[i] + 1]].tolist():
            end = start + len(known[i])
            if end > len(text.tokens) or text.owners[end - 1] != text.owners[start] or any(taken[start:end]):
                continue
            if np.array_equal(text.tokens[start:end], known[i]):
                taken[start:end] = b"\1" * (end - start)
                chosen.append((start, end))
    return chosen


def _repeated_runs(text: _Text, shortest: int) -> list[tuple[list[int], int]]:
    """Runs that stand in several prompts, those to take first first: where they start, and how long they are."""
    if not len(text.order):
        return []
    ordered_owners, firsts = text.owners[text.order], text.firsts[:-1]
    several = np.minimum.reduceat(ordered_owners, firsts) != np.maximum.reduceat(ordered_owners, firsts)
    is_run = (text.labels >= 0) & several[text.labels]
    if not is_run.any():
        return []
    labels = np.where(is_run, text.labels, -1)
    after, before = np.append(labels[1:], -1), np.append([-1], labels[:-1])
    goes_on = is_run & (after >= 0) & _is_one(text, after)[labels] & _is_one(text, before)[after]
    begins = np.flatnonzero(is_run & ~np.append([False], goes_on[:-1]))
    lengths = np.flatnonzero(is_run & ~goes_on) - begins + shortest
    # Of a text that repeats itself at once, such as blanks, only the first place is looked at, lest there be too many.
    order = np.argsort(labels[begins], kind="stable")
    same = np.diff(labels[begins[order]]) == 0
    apart = np.diff(begins[order]) >= lengths[order[:-1]]
    order = order[np.append([True], ~same | apart)]

    runs: dict[bytes, list[int]] = {}
    for start, length in zip(begins[order].tolist(), lengths[order].tolist(), strict=True):
        runs.setdefault(text.tokens[start : start + length].tobytes(), []).append(start)
    ranked = []
    for content, starts in runs.items():
        prompts = len(set(text.owners[starts].tolist()))
        if prompts > 1:
            ranked.append((-prompts, -len(starts), -len(content), content, starts))
    return [(starts, len(content) // text.tokens.itemsize) for *_, content, starts in sorted(ranked)]


def _is_one(text: _Text, beside: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[labels] whether all places of a window have the same one, and have one, beside them."""
    ordered, firsts = beside[text.order], text.firsts[:-1]
    least = np.minimum.reduceat(ordered, firsts)
    same: NDArray[np.bool_] = (least >= 0) & (least == np.maximum.reduceat(ordered, firsts))
    return same


def _take(
    starts: Sequence[int], length: int, owners: NDArray[np.int64], taken: bytearray, shortest: int
) -> list[tuple[int, int]]:
    """Take of a run what is left of it in all places, but for those where too little is."""
    left = [(start, *_free(taken[start : start + length])) for start in starts]
    left = [each for each in left if each[2] - each[1] >= shortest]
    first = max((begin for _, begin, _ in left), default=0)
    last = min((end for _, _, end in left), default=0)
    if last - first < shortest or len({int(owners[start]) for start, _, _ in left}) < 2:
        return []
    for start, _, _ in left:
        taken[start + first : start + last] = b"\1" * (last - first)
    return [(start + first, start + last) for start, _, _ in left]


def _free(taken: bytearray) -> tuple[int, int]:
    """The longest stretch that is not taken, the first of equals."""
    longest = max(taken.split(b"\1"), key=len)
    begin = taken.find(longest)
    return begin, begin + len(longest)


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """[count] of the base, from its 0th on, modulo 2**64."""
    factors = np.full(count, base, dtype=np.uint64)
    factors[:1] = 1
    powers: NDArray[np.uint64] = np.cumprod(factors)
    return powers
