"""Workloads as people write them: "burst:60", "poisson:2", "gamma:2,cv=3", "burstgpt:1.5" -> requests.

    burst:COUNT[,within=SECONDS]                      all at once, or spread over some seconds
    poisson:RATE                                      independent, RATE requests a second
    gamma:RATE[,cv=VARIATION]                         clumped above 1, regular below
    burstgpt:RATE[,cv=..][,period=SECONDS][,swing=..] days and nights with bursts; long-tailed lengths

Readers are "20" (tokens per second) or shares of classes, "0.4:15,0.6:20"; departures are "SHARE:MEAN_SECONDS".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvarn.simulation import workloads
from kvarn.simulation.workloads import Arrivals, Fixed, Lengths, LogNormal, RequestSpec, WorkloadError

DEFAULT_REQUESTS = 100
_PROMPT, _OUTPUT = Fixed(512), Fixed(256)
_CHAT_PROMPT, _CHAT_OUTPUT = LogNormal(400, 1.0, high=6000), LogNormal(200, 0.8, high=2000)
_OPTIONS = {"burst": {"within"}, "poisson": set(), "gamma": {"cv"}, "burstgpt": {"cv", "period", "swing"}}


@dataclass(frozen=True)
class WorkloadText:
    """A workload's text, taken apart."""

    kind: str
    number: float
    options: dict[str, float]

    @classmethod
    def parse(cls, text: str) -> WorkloadText:
        """WorkloadError that says what can be written."""
        head, *rest = text.split(",")
        kind, _, number = head.partition(":")
        if kind not in _OPTIONS:
            raise WorkloadError(f"workload is {text!r}; expected {', '.join(_OPTIONS)} and a number, like burst:60")
        where, pairs = f"workload {text!r}", (part.partition("=") for part in rest)
        options = {name: _number(value, where, "gamma:2,cv=3") for name, _, value in pairs}
        for name in options:
            if name not in _OPTIONS[kind]:
                known = ", ".join(sorted(_OPTIONS[kind])) or "no options"
                raise WorkloadError(f"workload {text!r} sets {name!r}; {kind} has {known}")
        return cls(kind, _number(number, where, f"{kind}:60"), options)

    def arrivals(self) -> Arrivals:
        if self.kind == "burst":
            return workloads.Burst(**self.options)
        if self.kind == "poisson":
            return workloads.Poisson(self.number)
        return (workloads.Gamma if self.kind == "gamma" else workloads.Diurnal)(self.number, **self.options)


def synthetic(
    text: str,
    *,
    requests: int | None = None,
    prompt: Lengths | None = None,
    output: Lengths | None = None,
    seed: int = 0,
) -> list[RequestSpec]:
    """The workload that `text` describes; a burst says itself how many requests it has."""
    what = WorkloadText.parse(text)
    count = int(what.number) if what.kind == "burst" else requests or DEFAULT_REQUESTS
    usual = (_CHAT_PROMPT, _CHAT_OUTPUT) if what.kind == "burstgpt" else (_PROMPT, _OUTPUT)
    return workloads.synthesize(count, what.arrivals(), prompt or usual[0], output or usual[1], seed=seed)


def with_clients(
    specs: Sequence[RequestSpec],
    readers: str = "",
    departures: str = "",
    *,
    stream_rate: float | None = None,
    seed: int = 0,
) -> list[RequestSpec]:
    """The same requests with readers and departures as written; empty texts leave them as they are.

    `stream_rate` (tokens per second) is for readers that nothing is known of.
    """
    chosen = [replace(spec, stream_rate=spec.stream_rate or stream_rate) for spec in specs]
    if readers:
        classes = [part.rpartition(":")[::2] for part in readers.split(",")]
        where, like = f"readers {readers!r}", "20 or 0.4:15,0.6:20"
        pairs = [(_number(share or "1", where, like), _number(rate, where, like)) for share, rate in classes]
        chosen = workloads.with_readers(chosen, pairs, seed=seed)
    if departures:
        share, _, seconds = departures.partition(":")
        numbers = [_number(one, f"abandon {departures!r}", "0.1:5") for one in (share, seconds)]
        chosen = workloads.with_departures(chosen, *numbers, seed=seed)
    return chosen


def _number(value: str, where: str, like: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise WorkloadError(f"{where} has {value!r} where a number is expected; write it like {like}")
    return number
