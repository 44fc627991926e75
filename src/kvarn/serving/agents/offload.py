"""What becomes of a conversation's KV while its agent's tool runs: rules, ours and those of others.

A *rule* says, at the start of a call and now and then after it, whether the KV stays on the device, goes to the host or
is let go; and in which order what stays is given up when blocks are short. Facts in, one word out.

Source: TokenCake (arXiv 2510.18586), Algorithm 1 (`Published`); InferCept (arXiv 2402.01869) for `MinimumWaste`;
Continuum (arXiv 2511.02230) for `PaysToKeep`; KVFlow (arXiv 2507.07400) for `StepsToExecution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from kvarn.serving.agents.lifecycle import Call

Fate = Literal["keep", "offload", "release", "discard"]


@dataclass(frozen=True, slots=True)
class Prospect:
    """One stalled conversation, and what could be done with it. Times in seconds."""

    call: Call
    blocks: int
    """Device blocks that letting go of it makes available."""
    tokens: int
    offload_seconds: float
    """To copy them to the host, behind what is queued."""
    upload_seconds: float
    """And back."""
    recompute_seconds: float
    """To compute them again."""
    has_host: bool
    """Whether there is room for it on the host."""

    @property
    def round_trip(self) -> float:
        return self.offload_seconds + self.upload_seconds


@dataclass(frozen=True, slots=True)
class Load:
    """The device at that moment."""

    waiting: Sequence[tuple[int, int]]
    """(blocks, tokens) of each waiting request, those to be served first in front."""
    tokens_per_second: float
    """What the device computes."""
    batch_tokens: int
    """Tokens of context of all that run."""
    queue_seconds: float
    """What a new request waits."""


class Rule(Protocol):
    @property
    def makes_way(self) -> bool:
        """Whether conversations give way to requests that have not begun, and not just to those that have."""
        ...

    def fate(self, prospect: Prospect, load: Load, now: float) -> Fate:
        """What to do with a conversation on the device."""
        ...

    def gives(self, prospect: Prospect, now: float) -> tuple[float, ...] | None:
        """Its place among those that give way when blocks are short, lower first; None: it does not."""
        ...


class Resident:
    """It stays: a live request that waits for its tool. The last to come gives way, to requests that run already."""

    makes_way = False

    def fate(self, prospect: Prospect, load: Load, now: float) -> Fate:
        return "keep"

    def gives(self, prospect: Prospect, now: float) -> tuple[float, ...] | None:
        return (-prospect.call.started,)


class Finished:
    """The request is over and its KV prefix cache like any other: what servers do that know nothing of tools."""

    makes_way = True

    def fate(self, prospect: Prospect, load: Load, now: float) -> Fate:
        return "release"

    def gives(self, prospect: Prospect, now: float) -> tuple[float, ...] | None:
        return ()


class Discard(Finished):
    """Gone at once, to be computed again."""

    def fate(self, prospect: Prospect, load: Load, now: float) -> Fate:
        return "discard"


class FixedTTL(Resident):
    """It stays for so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def fate(self, prospect: Prospect, load: Load, now: float) -> Fate:
        over = not prospect.call.finished and now - prospect.call.started >= self.seconds
        return "release" if over else "keep"


class PaysToKeep(Resident):
    """It stays for as long as is worth it: the time that maximises P(answer by then) x (what a return costs that has
    lost it) less the expected time that its blocks are held, weighted by the share of the device that they are."""

    def fate(self, prospect: Prospect, load: Load, now: float) -> Fate:
        call = prospect.call
        if call.finished:
            return "keep"
        forecast = call.forecast
        gain = prospect.recompute_seconds + load.queue_seconds
        share = prospect.tokens / max(1, prospect.tokens + load.batch_tokens)
        best, best_value = 0.0, 0.0
        for i, ratio in enumerate(forecast.ratios, start=1):
            ttl = ratio * forecast.seconds
            answered = i / len(forecast.ratios)
            held = sum(min(each, ratio) for each in forecast.ratios) / len(forecast.ratios) * forecast.seconds
            if answered * gain - share * held > best_value:
                best, best_value = ttl, answered * gain - share * held
        return "keep" if now - call.started <= best else "release"


class MinimumWaste(Resident):
    """Kept, copied out or dropped, whichever wastes least memory times time; a copy holds both ends, a recomputation
    holds what it computes and delays everybody."""

    def fate(self, prospect: Prospect, load: Load, now: float) -> Fate:
        call, tokens = prospect.call, prospect.tokens
        if call.finished:
            return "keep"
        keep = call.remaining(now) * tokens
        again = prospect.recompute_seconds
        discard = again * tokens + again * load.batch_tokens
        swap = prospect.round_trip * (tokens + load.batch_tokens) if prospect.has_host else float("inf")
        least = min(keep, discard, swap)
        return "keep" if least == keep else "offload" if least == swap else "discard"


class StepsToExecution(Resident):
    """It stays, and those furthest from their next model call in the graph give way first, whatever the clock says."""

    makes_way = True

    def gives(self, prospect: Prospect, now: float) -> tuple[float, ...] | None:
        steps = 0 if prospect.call.finished else 1
        return (-steps, prospect.call.started)


class Published(Resident):
    """Algorithm 1: once, when the call begins; offload if it outlasts the copies and a waiting request fits into what
    the device could compute meanwhile. Not asked: whether the blocks are enough for it, and who else counts on it."""

    def fate(self, prospect: Prospect, load: Load, now: float) -> Fate:
        call = prospect.call
        if call.looked_at > float("-inf") or call.finished:
            return "keep"
        call.looked_at = now
        window = call.forecast.seconds - prospect.round_trip
        if window <= 0 or not prospect.has_host:
            return "keep"
        fitting = [tokens for _, tokens in load.waiting if tokens <= window * load.tokens_per_second]
        return "offload" if fitting else "keep"


class Hardened(Resident):
    """It stays as long as nobody can use its blocks; then those give way that come back last, where that is late
    enough for the copies, or for computing it again where there is no room on the host.

    margin   calls that end within so many round trips are not moved
    least    nor those that end within so many seconds
    """

    makes_way = True

    def __init__(self, margin: float = 2.0, least: float = 0.05) -> None:
        self.margin = margin
        self.least = least

    def gives(self, prospect: Prospect, now: float) -> tuple[float, ...] | None:
        call = prospect.call
        there_and_back = prospect.round_trip if prospect.has_host else prospect.recompute_seconds
        remaining = call.remaining(now)
        if remaining <= max(self.least, self.margin * min(there_and_back, prospect.recompute_seconds)):
            return None
        return (-remaining,)
