"""What computing has lately cost on this device: seconds of a step, of prefill. Facts in, estimates out.

A step of `rows` decoding requests over `context` tokens takes about c0 + c1 rows + c2 context seconds; the three are
fitted to the steps seen, older ones counting less. Prefill is what mixed steps took beyond that, by token, over the
last 32 of them.

Source: TokenFlow (arXiv 2510.02758), 4.4, whose policy needs these to choose between loading and recomputing.
"""

from __future__ import annotations

from collections import deque

import numpy as np

_MEMORY = 0.98
"""What a step counts for when the next one is noted: about the last 50 matter."""
_PREFILLS = 32
_PRIOR = (2e-3, 2e-4, 1e-8)
"""c0, c1, c2 before anything is known: seconds, seconds a row, seconds a token of context."""
_PRIOR_PREFILL = 5e-4


class Costs:
    """Running estimates."""

    def __init__(self) -> None:
        # Normal equations of the fit, beginning with a weak belief in the prior.
        self._scale = np.array([1.0, 16.0, 16_384.0])
        self._products = np.eye(3) * 0.1
        self._targets = self._products @ (np.array(_PRIOR) * self._scale)
        self._fitted: tuple[float, float, float] | None = _PRIOR
        self._prefills: deque[tuple[int, float]] = deque(maxlen=_PREFILLS)
        self._prefill_each = _PRIOR_PREFILL

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
        facts = np.array([1.0, rows, context]) / self._scale
        self._products = _MEMORY * self._products + np.outer(facts, facts)
        self._targets = _MEMORY * self._targets + facts * seconds
        self._fitted = None

    def decode_seconds(self, rows: int, context: int) -> float:
        """A step in which so many requests, with so many tokens of context together, get a token each."""
        if self._fitted is None:
            ridge = 1e-3 * np.eye(3)
            prior = ridge @ (np.array(_PRIOR) * self._scale)
            fitted = np.linalg.solve(self._products + ridge, self._targets + prior) / self._scale
            self._fitted = (max(fitted[0], 0.0), max(fitted[1], 0.0), max(fitted[2], 0.0))
        c0, c1, c2 = self._fitted
        return max(1e-6, c0 + c1 * rows + c2 * context)

    def prefill_seconds(self, tokens: int) -> float:
        """Computing so many prompt tokens."""
        return tokens * self._prefill_each
