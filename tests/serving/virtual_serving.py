"""Requests that come at their times behind a real engine on a virtual clock; copies end and fail at random."""

from __future__ import annotations

import random
from collections.abc import Callable

from hypothesis import strategies as st

from kvarn.serving.engine import Engine
from kvarn.serving.kvcache.copies import Direction
from kvarn.serving.policies.fcfs import FirstComeFirstServed
from kvarn.serving.policies.protocol import Decision, Snapshot
from kvarn.serving.request import Request

from .paged_text import make_request

REQUESTS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(0, 3), st.integers(1, 50), st.floats(0, 4), st.sampled_from([4.0, 20.0])),
    min_size=1,
    max_size=14,
)
"""Prompt length and family, output tokens, seconds of arrival, tokens a second read."""


def prompt(length: int, family: int) -> list[int]:
    return [(family * 101 + i * 7) % 900 for i in range(length)]


def arriving(requests: list[tuple[int, int, int, float, float]]) -> list[Request]:
    """Requests as REQUESTS draws them."""
    return [
        make_request(f"r{i}", prompt(length, family), count, arrival=at, stream_rate=rate)
        for i, (length, family, count, at, rate) in enumerate(requests)
    ]


class Told:
    """Does what it is told in the next step; else first come, first served."""

    def __init__(self) -> None:
        self.usual = FirstComeFirstServed()
        self.order: Callable[[Snapshot], Decision] | None = None

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        order, self.order = self.order, None
        return self.usual.decide(snapshot, now) if order is None else order(snapshot)


def serve(
    engine: Engine,
    coming: list[Request],
    rng: random.Random,
    *,
    failing: float = 0.0,
    copying: float = 0.5,
    max_steps: int = 20_000,
) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    """Serve requests that come at their times; copies end at random, and fail at random. Texts, and their times."""
    coming = sorted(coming, key=lambda request: -request.arrival)
    if engine.tiers is not None:
        engine.tiers.copier.job_seconds = 1e-3
    texts = {request.id: [] for request in coming}
    times = {request.id: [] for request in coming}
    for _ in range(max_steps):
        now = engine.clock.now()
        while coming and coming[-1].arrival <= now:
            engine.add(coming.pop())
        if not engine.has_work and not coming:
            return texts, times
        for emission in engine.step():
            assert emission.token is not None
            texts[emission.request.id].append(emission.token)
            times[emission.request.id].append(engine.clock.now())
        if engine.clock.now() == now:
            engine.clock.advance(0.05)
        while engine.tiers is not None and rng.random() < copying:
            engine.tiers.copier.complete(rng.choice(list(Direction)), fail=rng.random() < failing)
    raise AssertionError(f"not done: {len(engine.waiting)} waiting, {len(engine.running)} running")
