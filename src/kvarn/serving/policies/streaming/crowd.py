"""Everybody who has been let in and is not being loaded, as columns: arithmetic on hundreds of requests at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvarn.serving.policies.protocol import RequestView, Snapshot
from kvarn.serving.policies.streaming.gains import Column


class Crowd:
    """Facts of residents (they run) and after them of the suspended (they have run and wait); each of shape (n,)."""

    def __init__(self, snapshot: Snapshot, suspended: Sequence[RequestView], now: float) -> None:
        self.requests = requests = [*snapshot.running, *suspended]
        self.num_residents = len(snapshot.running)
        self.tokens = _column([request.num_tokens for request in requests])
        self.prompts = _column([request.prompt_length for request in requests])
        self.limits = _column([request.max_outputs for request in requests])
        readers = [request.reader for request in requests]
        self.rates = _column([reader.rate for reader in readers])
        self.dry = _column([reader.dry_at() for reader in readers])
        """When each reader will have read everything; -inf before his first token."""
        self.slack = np.maximum(0.0, self.dry - now)

    @property
    def outputs(self) -> Column:
        return self.tokens - self.prompts


def _column(values: Sequence[float]) -> Column:
    return np.array(values, dtype=np.float64)
