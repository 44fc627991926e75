"""The paper's example of two places and three readers, played by the real engine and policy (note 4.6).

Each place makes 40 tokens a second. Readers of 20 and 30 tokens a second come at t = 0, one of 25 at t = 2. The paper
has the first give way at t = 3, and come back at t = 5 for the second, with nobody ever waiting for a token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvarn.serving.batch import Batch, SampledToken
from kvarn.serving.clock import VirtualClock
from kvarn.serving.costs import Costs
from kvarn.serving.engine import Engine
from kvarn.serving.kvcache.cache import KVCache
from kvarn.serving.policies.protocol import Decision, Policy, Snapshot
from kvarn.serving.policies.streaming.policy import Streaming
from kvarn.serving.policies.streaming.settings import StreamingSettings
from kvarn.serving.request import Request
from kvarn.serving.sampling.params import SamplingParams

_STEPS_PER_SECOND = 40
_READERS = (("R1", 20.0, 0.0), ("R2", 30.0, 0.0), ("R3", 25.0, 2.0))
"""Name, tokens per second, second of arrival."""
_END = 14
"""Second at which nobody looks any more; all are still being served."""


class Metronome:
    """An executor whose every step ends on the next beat, however much is in it."""

    def __init__(self, clock: VirtualClock, beats_per_second: int) -> None:
        self.clock = clock
        self.beats_per_second = beats_per_second
        self.num_blocks = 1000
        self.forward_seconds = 0.0

    def add(self, request: Request) -> None:
        """Nothing to prepare."""

    def remove(self, request: Request) -> None:
        """Nothing to forget."""

    def execute(self, batch: Batch) -> list[list[SampledToken]]:
        beat = round(self.clock.now() * self.beats_per_second) + 1
        self.clock.advance(beat / self.beats_per_second - self.clock.now())
        return [[SampledToken(0)] for row in batch.rows if row.samples]


class SteadyCosts(Costs):
    """Every step takes as long, and prompts nothing: known, not learned."""

    def __init__(self, step_seconds: float) -> None:
        super().__init__()
        self.step_seconds = step_seconds

    def note_step(self, rows: int, context: int, prefill_tokens: int, seconds: float) -> None:
        """Nothing to learn."""

    def decode_seconds(self, rows: int, context: int) -> float:
        return self.step_seconds

    def prefill_seconds(self, tokens: int) -> float:
        return 0.0


@dataclass
class Played:
    """What happened, in seconds."""

    preemptions: list[tuple[float, str]] = field(default_factory=list)
    """When, and who gave way."""
    starts: dict[str, list[float]] = field(default_factory=dict)
    """When each was computed again after not having been."""
    stalls: int = 0
    """How often any reader waited for a token."""


class _Watched:
    """A policy whose decisions are noted."""

    def __init__(self, policy: Policy, played: Played) -> None:
        self.policy, self.played = policy, played
        self._computed: set[str] = set()

    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        decision = self.policy.decide(snapshot, now)
        self.played.preemptions += [(now, id) for id in decision.preempt]
        computed = {id for id, _ in decision.grants}
        for id in computed - self._computed:
            self.played.starts.setdefault(id, []).append(now)
        self._computed = computed
        return decision


def play() -> Played:
    """Serve the three for 14 seconds with the paper's numbers: looks once a second, three seconds to give way."""
    played, clock = Played(), VirtualClock()
    policy = _Watched(Streaming(StreamingSettings(tick=1.0, safety=3.0, horizon=1.0)), played)
    executor = Metronome(clock, _STEPS_PER_SECOND)
    engine = Engine(
        executor, policy, KVCache(executor.num_blocks, 4), clock,
        token_budget=1000, max_running=2, max_context=10_000, vocab_size=10,
    )  # fmt: skip
    engine.costs = SteadyCosts(1 / _STEPS_PER_SECOND)  # the example has no unknowns
    params = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)
    requests = [
        Request.create(name, [place], params, arrival=arrival, stream_rate=rate)
        for place, (name, rate, arrival) in enumerate(_READERS)
    ]
    coming = list(requests)
    while clock.now() < _END:
        while coming and coming[0].arrival <= clock.now():
            engine.add(coming.pop(0))
        engine.step()
    played.stalls = sum(request.reader.stalls for request in requests)
    return played


@dataclass(frozen=True)
class Toy:
    """The cell."""

    cost = 1.0
    alone = False

    def run(self) -> dict[str, Any]:
        played = play()
        return {"preemptions": played.preemptions, "starts": played.starts, "stalls": played.stalls}
