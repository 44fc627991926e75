"""What computing has lately cost on this device: seconds of a step, of prefill. Facts in, estimates out.

A step of `rows` decoding requests over `context` tokens takes about level x (c0 + c1 rows + c2 context) seconds. The
three are fitted slowly, over hundreds of steps, since many like batches say nothing of other ones; the level follows
within a second what neighbours or clock rates do. Prefill is what mixed steps took beyond that, by token, over the last
32 of them.

Source: TokenFlow (arXiv 2510.02758), 4.4, whose policy needs these to choose between loading and recomputing.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from kvarn.serving.batch import Batch

_SHAPE_MEMORY = 0.998
"""What a step counts for in the shape when the next one is noted: about the last 500 matter."""
_LEVEL_MEMORY = 0.95
_STRANGE = 4.0
"""A step that takes so many times what it should counts as that: something else has held it up."""
_LOWEST_LEVEL = 1e-3
"""Clocks that stand still, as in tests, shall not make it 0."""
_PREFILLS = 32
_PRIOR = (2e-3, 2e-4, 1e-8)
"""c0, c1, c2 before anything is known: seconds, seconds a row, seconds a token of context."""
_PRIOR_PREFILL = 5e-4
_SOON = 10
"""Steps after which the estimates are believed to be of this machine."""


class Costs:
    """Running estimates."""

    def __init__(self) -> None:
        # Normal equations of the fit, beginning with a weak belief in the prior.
        self._scale = np.array([1.0, 16.0, 16_384.0])
        self._products = np.eye(3) * 1e-3
        self._targets = self._products @ (np.array(_PRIOR) * self._scale)
        self._fitted: tuple[float, float, float] | None = _PRIOR
        self._level = 1.0
        self._steps = 0
        self._prefills: deque[tuple[int, float]] = deque(maxlen=_PREFILLS)
        self._prefill_each = _PRIOR_PREFILL

    def note_batch(self, batch: Batch, seconds: float) -> None:
        """A step: what it computed, and how long that took."""
        rows = context = prompt_tokens = 0
        for row in batch.rows:
            if row.count - row.drafts > 1:
                prompt_tokens += row.count
            else:
                rows += 1
                context += row.request.num_tokens
        self.note_step(rows, context, prompt_tokens, seconds)

    def note_step(self, rows: int, context: int, prefill_tokens: int, seconds: float) -> None:
        """A step: decoding requests, their tokens of context together, prompt tokens computed beside them."""
        if prefill_tokens:
            beyond = max(0.0, seconds - self.decode_seconds(rows, context))
            self._prefills.append((prefill_tokens, beyond))
            seen = sum(count for count, _ in self._prefills)
            self._prefill_each = sum(seconds for _, seconds in self._prefills) / seen
            return
        if not rows:
            return
        self._steps += 1
        if self._steps > _SOON:
            expected = self._shape(rows, context)
            seconds = min(seconds, _STRANGE * self._level * expected)
            level = _LEVEL_MEMORY * self._level + (1 - _LEVEL_MEMORY) * seconds / expected
            self._level = max(level, _LOWEST_LEVEL)
        facts = np.array([1.0, rows, context]) / self._scale
        self._products = _SHAPE_MEMORY * self._products + np.outer(facts, facts)
        self._targets = _SHAPE_MEMORY * self._targets + facts * (seconds / self._level)
        self._fitted = None

    def decode_seconds(self, rows: int, context: int) -> float:
        """A step in which so many requests, with so many tokens of context together, get a token each."""
        return self._level * self._shape(rows, context)

    def _shape(self, rows: int, context: int) -> float:
        if self._fitted is None:
            ridge = 1e-3 * np.eye(3)
            prior = ridge @ (np.array(_PRIOR) * self._scale)
            c0, c1, c2 = _nonnegative(self._products + ridge, self._targets + prior) / self._scale
            self._fitted = (float(c0), float(c1), float(c2))
        c0, c1, c2 = self._fitted
        return max(1e-6, c0 + c1 * rows + c2 * context)

    def prefill_seconds(self, tokens: int) -> float:
        """Computing so many prompt tokens."""
        return tokens * self._prefill_each


def _nonnegative(products: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares from normal equations, without negative coefficients: those that would be are left out."""
    kept = list(range(len(targets)))
    while kept:
        solved = np.linalg.solve(products[np.ix_(kept, kept)], targets[kept])
        if solved.min() >= 0.0:
            break
        kept.pop(int(solved.argmin()))
    fitted = np.zeros(len(targets))
    if kept:
        fitted[kept] = solved
    return fitted
