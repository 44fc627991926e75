"""How long tools take: durations in, forecasts with their spread out.

A forecast's middle is the client's estimate, what such calls have lately taken, or between the two when both are known.
Its spread is how wrong forecasts of such calls have been: the ratios of what they took to what was forecast. So a
client whose estimates are all too short by half is corrected within a few calls, and heavy tails widen what is said.
What is asked of a call that has run for a while already is answered from the calls that ran longer than that.

Calls are alike by tenant, agent and tool, else by tenant and tool. Stages of a call are learnt as calls of their own.

Source: TokenCake (arXiv 2510.18586), Eq. 1, for the middle: t = alpha * requested + (1 - alpha) * history.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from math import exp

_DEFAULT_SECONDS = 1.0
"""Of a call that nobody knows anything of."""
_SHORTEST = 1e-3
_SAMPLES = 64
"""Ratios remembered of each kind of call."""
_PRIOR = tuple(exp(0.5 * z) for z in (-1.28, -0.67, -0.25, 0.0, 0.25, 0.67, 1.28))
"""Ratios believed before there are some: a lognormal with deviation 0.5."""
_TOLD = tuple(exp(0.15 * z) for z in (-1.28, -0.67, -0.25, 0.0, 0.25, 0.67, 1.28))
"""As that, of a tool that tells how far it is."""
_OVERDUE = 0.5
"""A call that has outlasted all that are known is expected to run on for so much of what it has run."""
_KINDS = 4096


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one call. `seconds`: its middle."""

    seconds: float
    ratios: tuple[float, ...] = _PRIOR
    """What calls took over what was forecast, in ascending order."""
    shift: float = 0.0
    """Seconds of its run that an earlier forecast was of: this one is of the rest."""
    guessed: bool = False
    """Made of nothing: how wrong it was says nothing of later ones."""

    def until(self, elapsed: float, quantile: float) -> float:
        """Seconds until such a call has ended with this probability, seen from its start; 0 when that is past."""
        place = quantile * (len(self.ratios) - 1)
        return max(0.0, self._at(place) * self.seconds - max(0.0, elapsed - self.shift))

    def remaining(self, elapsed: float, quantile: float = 0.5) -> float:
        """Seconds still to go, not exceeded with this probability, for a call that has run for `elapsed` seconds."""
        elapsed = max(0.0, elapsed - self.shift)
        first = bisect_right(self.ratios, elapsed / self.seconds)
        left = len(self.ratios) - first
        if left == 0:
            return _OVERDUE * elapsed
        return max(0.0, self._at(first + quantile * (left - 1)) * self.seconds - elapsed)

    def _at(self, place: float) -> float:
        """The ratio at a place of their order, between two of them where it is between."""
        low = int(place)
        high = min(low + 1, len(self.ratios) - 1)
        return self.ratios[low] + (place - low) * (self.ratios[high] - self.ratios[low])


@dataclass(slots=True)
class _Kind:
    """What is known of one kind of call."""

    history: float | None = None
    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))


class Forecaster:
    """The history of all kinds of calls, the least recently used forgotten first.

    blend    weight of a client's estimate against history (the paper's alpha, which it leaves open)
    memory   weight of the newest duration in the history
    """

    def __init__(self, blend: float = 0.5, memory: float = 0.5) -> None:
        self.blend = blend
        self.memory = memory
        self.count = 0
        """Calls learnt from."""
        self.error_seconds = 0.0
        """Sum of their absolute errors."""
        self._kinds: OrderedDict[tuple[str, str, str], _Kind] = OrderedDict()

    def forecast(self, tenant: str, agent: str, tool: str, estimate: float | None = None) -> Forecast:
        """Of a call that begins now. `estimate`: the client's, in seconds."""
        known = self._known(tenant, agent, tool)
        history = None if known is None else known.history
        if estimate is None:
            middle = _DEFAULT_SECONDS if history is None else history
        else:
            middle = estimate if history is None else self.blend * estimate + (1 - self.blend) * history
        ratios = () if known is None else tuple(known.ratios)
        if len(ratios) < len(_PRIOR):
            ratios += _PRIOR
        guessed = estimate is None and history is None
        return Forecast(max(middle, _SHORTEST), tuple(sorted(ratios)), guessed=guessed)

    def learn(self, tenant: str, agent: str, tool: str, forecast: Forecast, seconds: float) -> None:
        """A call took so long. The first duration of a kind takes the place of what was assumed."""
        self.count += 1
        self.error_seconds += abs(seconds - forecast.seconds)
        for key in {(tenant, agent, tool), (tenant, "", tool)}:
            kind = self._kinds.setdefault(key, _Kind())
            self._kinds.move_to_end(key)
            before = seconds if kind.history is None else kind.history
            kind.history = before + self.memory * (seconds - before)
            if not forecast.guessed:
                kind.ratios.append(max(seconds, _SHORTEST) / forecast.seconds)
        while len(self._kinds) > _KINDS:
            self._kinds.popitem(last=False)

    def seconds(self, tenant: str, agent: str, tool: str) -> float | None:
        """What such calls have lately taken; None when there was none."""
        known = self._known(tenant, agent, tool)
        return None if known is None else known.history

    def _known(self, tenant: str, agent: str, tool: str) -> _Kind | None:
        return self._kinds.get((tenant, agent, tool)) or self._kinds.get((tenant, "", tool))


def of_fraction(elapsed: float, fraction: float) -> Forecast:
    """Of a call that says that it has come so far (0 to 1, exclusive) in `elapsed` seconds."""
    return Forecast(max(_SHORTEST, elapsed * (1.0 - fraction) / fraction), _TOLD, shift=elapsed)


def of_rest(seconds: float, elapsed: float, before: Forecast) -> Forecast:
    """Of a call whose stages to come take so long, after `elapsed` seconds; as sure as the forecast before."""
    return Forecast(max(_SHORTEST, seconds), before.ratios, shift=elapsed)
