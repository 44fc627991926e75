"""What a run was like for the people who waited: token times in, latency, throughput and reading quality out.

The same report serves the load generator and the simulator. Definitions, per request with arrival a and token
times t_1..t_L (seconds):

    TTFT = t_1 - a     TPOT = (t_L - t_1) / (L - 1)     ITL = t_j - t_(j-1)     E2EL = t_L - a

A reader takes one token every 1/r seconds and never reads a token before it exists:

    play_1 = t_1,   play_j = max(t_j, play_(j-1) + 1/r)

A token that comes after the reader wanted it stalls him for t_j - (play_(j-1) + 1/r) seconds; B_j, the tokens
made and not yet read at t_j, is how far generation is ahead of him. *Effective throughput* counts a token fully
while B_j is at most 10 % of L, not at all above 20 %, linearly between, over the makespan (first arrival to last
token). It ignores stalls and TTFT, so a report always shows them beside it.

Source: TokenFlow (arXiv 2510.02758), Eq. 1 and its effective throughput.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group
from rich.table import Table
from rich.text import Text

Times = NDArray[np.float64]

FULL_WEIGHT_SHARE = 0.1
"""Up to this share of the output unread, a token counts fully."""
NO_WEIGHT_SHARE = 0.2
"""Above this share of the output unread, a token counts nothing."""
_TICK = 1e-6
"""Seconds below which two times are the same: the sums of a playback clock carry rounding."""


@dataclass(frozen=True)
class RequestRecord:
    """What happened to one request. Times are seconds on any one clock."""

    arrival: float
    prompt_tokens: int
    token_times: tuple[float, ...] = ()
    """When each output token reached the client, ascending."""
    stream_rate: float | None = None
    """Tokens per second its reader consumes."""
    error: str | None = None
    """Why it failed; its tokens then count for nothing."""

    @property
    def ok(self) -> bool:
        return self.error is None and len(self.token_times) > 0


@dataclass(frozen=True)
class Slo:
    """Latency a request must keep to be good, in seconds; None asks for nothing."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None


@dataclass(frozen=True)
class Distribution:
    """Summary of a sample in seconds; all zeros with `count` 0 when there was nothing to measure."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float] | Times) -> Distribution:
        if len(values) == 0:
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        sample = np.asarray(values, dtype=np.float64)
        p50, p90, p99 = (float(p) for p in np.percentile(sample, (50, 90, 99)))
        return cls(len(sample), float(sample.mean()), p50, p90, p99, float(sample.max()))


@dataclass(frozen=True)
class Playback:
    """One output as its reader met it."""

    rebuffer_seconds: float
    stalls: int
    """How often the reader had to wait after the first token."""
    unread: NDArray[np.int64]
    """Shape (L,): tokens made and not yet read when token j was made, B_j; the token being read counts as read."""
    effective_tokens: float
    """Sum of the weights of the tokens, 0 to L."""


@dataclass(frozen=True)
class Report:
    """Seconds, tokens per second and requests per second over one run."""

    requests: int
    completed: int
    failures: dict[str, int]
    """Reason -> how often."""
    makespan: float
    prompt_tokens: int
    output_tokens: int
    requests_per_second: float
    output_throughput: float
    total_throughput: float
    """Prompt and output tokens per second."""
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    e2el: Distribution
    slo: Slo
    goodput: float
    """Requests per second that kept every SLO."""
    good_share: float
    """Of all requests, failed ones included, the share that kept every SLO."""
    stream_rate: float | None
    """Tokens per second assumed of readers the workload says nothing of."""
    effective_throughput: float
    effective_share: float
    """Effective tokens as a share of the output tokens."""
    stalled_requests: int
    stalls: int
    rebuffer: Distribution
    """Seconds a reader stood still, per request."""

    def to_json(self) -> dict[str, Any]:
        """Nested plain values; keys as the fields are called."""
        return asdict(self)


def playback(token_times: Sequence[float] | Times, stream_rate: float) -> Playback:
    """Play one output (ascending seconds, at least one) to a reader of `stream_rate` tokens per second."""
    times = np.asarray(token_times, dtype=np.float64)
    length = len(times)
    schedule = np.arange(length) / stream_rate
    # play_j - (j-1)/r is a running maximum, so the recurrence is one scan; each rise of it is a stall.
    lateness = np.maximum.accumulate(times - schedule)
    rises = np.diff(lateness)
    consumed = np.searchsorted(lateness + schedule, times + _TICK, side="right")
    unread = np.maximum(np.arange(1, length + 1) - consumed, 0)
    return Playback(
        rebuffer_seconds=float(lateness[-1] - lateness[0]),
        stalls=int(np.count_nonzero(rises > _TICK)),
        unread=unread,
        effective_tokens=float(token_weights(unread, length).sum()),
    )


def token_weights(unread: NDArray[np.int64], output_tokens: int) -> Times:
    """Eq. 1 with tau = 0.1 L and alpha = 10 / L: 1 up to 10 % of the output unread, 0 from 20 % on, linear between."""
    share = unread / output_tokens
    return np.clip((NO_WEIGHT_SHARE - share) / (NO_WEIGHT_SHARE - FULL_WEIGHT_SHARE), 0.0, 1.0)


def summarize(records: Sequence[RequestRecord], *, slo: Slo = Slo(), stream_rate: float | None = None) -> Report:
    """Reduce a run to its report. `stream_rate` is assumed of readers whose record names none; None leaves them out."""
    done = [record for record in records if record.ok]
    ttft = [record.token_times[0] - record.arrival for record in done]
    e2el = [record.token_times[-1] - record.arrival for record in done]
    tpot = [_tpot(record) for record in done if len(record.token_times) > 1]
    gaps = [np.diff(record.token_times) for record in done]
    makespan = _makespan(records)
    prompt_tokens = sum(record.prompt_tokens for record in done)
    output_tokens = sum(len(record.token_times) for record in done)
    good = sum(_keeps(record, slo) for record in done)
    read = [playback(record.token_times, rate) for record in done if (rate := record.stream_rate or stream_rate)]
    effective = sum(one.effective_tokens for one in read)

    def per_second(amount: float) -> float:
        return amount / makespan if makespan > 0 else 0.0

    return Report(
        requests=len(records),
        completed=len(done),
        failures=dict(Counter(record.error or "no tokens" for record in records if not record.ok).most_common()),
        makespan=makespan,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        requests_per_second=per_second(len(done)),
        output_throughput=per_second(output_tokens),
        total_throughput=per_second(prompt_tokens + output_tokens),
        ttft=Distribution.of(ttft),
        tpot=Distribution.of(tpot),
        itl=Distribution.of(np.concatenate(gaps) if gaps else []),
        e2el=Distribution.of(e2el),
        slo=slo,
        goodput=per_second(good),
        good_share=good / len(records) if records else 0.0,
        stream_rate=stream_rate,
        effective_throughput=per_second(effective),
        effective_share=effective / output_tokens if output_tokens else 0.0,
        stalled_requests=sum(one.stalls > 0 for one in read),
        stalls=sum(one.stalls for one in read),
        rebuffer=Distribution.of([one.rebuffer_seconds for one in read]),
    )


def render(report: Report, title: str = "") -> Group:
    """The report as two tables for people: latencies in ms, then everything else in its own unit."""
    latencies = Table("ms", "mean", "P50", "P90", "P99", "max")
    for column in latencies.columns[1:]:
        column.justify = "right"
    rows = (("TTFT", report.ttft), ("TPOT", report.tpot), ("ITL", report.itl), ("E2EL", report.e2el))
    for name, sample in rows:
        values = (sample.mean, sample.p50, sample.p90, sample.p99, sample.max)
        latencies.add_row(name, *(f"{value * 1e3:,.1f}" if sample.count else "-" for value in values))
    rest = Table.grid(padding=(0, 2))
    for name, text in _scalars(report):
        rest.add_row(f" {name}", text)
    parts = (latencies, rest)
    return Group(Text(title, style="italic"), *parts) if title else Group(*parts)


def _scalars(report: Report) -> list[tuple[str, str]]:
    rows = [
        ("requests", f"{report.completed} of {report.requests} completed"),
        ("makespan s", f"{report.makespan:,.2f}"),
        ("requests/s", f"{report.requests_per_second:,.2f}"),
        ("output tokens/s", f"{report.output_throughput:,.1f}"),
        ("total tokens/s", f"{report.total_throughput:,.1f}"),
    ]
    if report.slo != Slo():
        rows.append(("goodput requests/s", f"{report.goodput:,.2f} ({report.good_share:.0%} keep the SLOs)"))
    if report.rebuffer.count:
        rows.append(
            ("effective tokens/s", f"{report.effective_throughput:,.1f} ({report.effective_share:.0%} of output)")
        )
        rebuffer = f"{report.rebuffer.mean:.2f} s mean, {report.rebuffer.max:.2f} s max"
        rows.append(("stalls", f"{report.stalls} in {report.stalled_requests} requests; {rebuffer}"))
    rows.extend((f"failed: {reason}", str(count)) for reason, count in report.failures.items())
    return rows


def _tpot(record: RequestRecord) -> float:
    return (record.token_times[-1] - record.token_times[0]) / (len(record.token_times) - 1)


def _keeps(record: RequestRecord, slo: Slo) -> bool:
    ttft = record.token_times[0] - record.arrival
    tpot = _tpot(record) if len(record.token_times) > 1 else 0.0
    e2el = record.token_times[-1] - record.arrival
    limits = ((ttft, slo.ttft), (tpot, slo.tpot), (e2el, slo.e2el))
    return all(limit is None or value <= limit for value, limit in limits)


def _makespan(records: Sequence[RequestRecord]) -> float:
    """Seconds from the first arrival (of any request) to the last token of a completed one; 0 when none completed."""
    last = max((record.token_times[-1] for record in records if record.ok), default=None)
    return 0.0 if last is None else last - min(record.arrival for record in records)
