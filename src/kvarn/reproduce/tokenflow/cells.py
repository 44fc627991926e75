"""One simulated run of a burst or a stream of requests: conditions and seed in, figures out.

Lengths are normal with a quarter of the mean as deviation unless a load says otherwise: the paper gives means only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.serving.config import EngineConfig, PolicyName
from kvarn.serving.engine import Engine
from kvarn.serving.kvcache.copies import CopyRules
from kvarn.simulation import runner, workloads
from kvarn.simulation.assemble import simulated_engine
from kvarn.simulation.report import RequestRecord, playback, summarize
from kvarn.simulation.workloads import Arrivals, Burst, Lengths, RequestSpec, TruncatedNormal

RATE = 20.0
"""Tokens a second that readers take where nothing else is said."""
_WITHOUT_HOST: tuple[PolicyName, ...] = ("qoe-recompute", "fcfs-conservative", "fcfs-paced")
"""One recomputes, as published; the others never take anybody off the device, and would only copy for nothing."""
_BLOCK = 256
"""Tokens of a shared prefix go in multiples of this."""
_POINTS = 240
"""Moments at which the series of a picture are looked at."""


def about(mean: float) -> TruncatedNormal:
    """Lengths around a mean."""
    return TruncatedNormal(mean, mean / 4, high=int(4 * mean))


@dataclass(frozen=True)
class Load:
    """Who asks for how much, and when."""

    requests: int
    prompt: Lengths
    output: Lengths
    arrivals: Arrivals = field(default=Burst())
    readers: tuple[tuple[float, float], ...] = ((1.0, RATE),)
    """Weight and tokens per second of each class."""
    declared: float = 1.0
    """What clients say of their rate, as a multiple of the truth."""
    leaving: tuple[float, float] | None = None
    """Share that leaves, and after how many seconds on average."""
    asked: int | None = None
    """Tokens that every client asks for at most; None: exactly as many as it gets, so that policies know lengths."""
    shared_tokens: int = 0
    """First tokens that all prompts have in common."""

    def specs(self, seed: int) -> list[RequestSpec]:
        specs = workloads.synthesize(self.requests, self.arrivals, self.prompt, self.output, seed=seed)
        specs = workloads.with_readers(specs, self.readers, seed=seed)
        if self.declared != 1.0:
            specs = [replace(spec, declared_rate=(spec.stream_rate or RATE) * self.declared) for spec in specs]
        if self.asked:
            specs = [replace(spec, max_tokens=max(self.asked, spec.output_tokens)) for spec in specs]
        if self.leaving:
            specs = workloads.with_departures(specs, *self.leaving, seed=seed)
        if self.shared_tokens:
            prefix = tuple(range(1, self.shared_tokens // _BLOCK + 1))
            specs = [replace(spec, prefix_ids=prefix, prefix_block_tokens=_BLOCK) for spec in specs]
        return specs


@dataclass(frozen=True)
class Device:
    """What serves: a device of the table, a model, and the memory it may use."""

    name: str
    hardware: str
    model: str
    memory_fraction: float
    host_gigabytes: int
    scale: float = 1.0
    """Share of its KV memory, on the device and the host."""
    link: float = 1.0
    """Share of the bandwidth between both."""

    @property
    def host_bytes(self) -> int:
        return int(self.scale * self.host_gigabytes * 1e9)


@dataclass(frozen=True)
class Switches:
    """What of the streaming policy and its copies differs from the defaults."""

    options: tuple[str, ...] = ()
    """Of the policy, such as "tick=0.5"."""
    copies: CopyRules = field(default=CopyRules())
    one_way: bool = False
    """Whether the link to the host moves one way at a time."""


@dataclass(frozen=True)
class Simulated:
    """A cell: one load, device, policy and seed."""

    load: Load
    device: Device
    policy: PolicyName
    seed: int
    switches: Switches = field(default=Switches())
    series: bool = False
    """Whether what pictures need is kept."""

    alone = False

    @property
    def cost(self) -> float:
        work = {"streaming": 3.0, "qoe-swap": 3.0, "qoe-recompute": 3.0}.get(self.policy, 1.0)
        return work * self.load.requests * getattr(self.load.output, "mean", 300)

    def run(self) -> dict[str, Any]:
        engine = self._engine()
        done = runner.run(engine, self.load.specs(self.seed))
        figures = _figures(done.records)
        figures |= {"preemptions": engine.counters.preemptions, "loads": engine.counters.loads}
        if self.series:
            figures["series"] = _series(done)
        return figures

    def _engine(self) -> Engine:
        device, model = load_accelerator(self.device.hardware), load_model_shape(self.device.model)
        accelerator = replace(
            device,
            device_to_host=device.device_to_host * self.device.link,
            host_to_device=device.host_to_device * self.device.link,
            duplex=device.duplex and not self.switches.one_way,
        )
        config = EngineConfig(
            model=model.name,
            policy=self.policy,
            token_budget=accelerator.token_budget,
            prefill_budget=accelerator.prefill_budget,
            max_running=accelerator.max_running,
            host_memory_bytes=0 if self.policy in _WITHOUT_HOST else self.device.host_bytes,
            policy_options=self.switches.options,
            speculation="off",
        )
        return simulated_engine(
            config,
            accelerator,
            model,
            memory_fraction=self.device.memory_fraction,
            kv_share=self.device.scale,
            copy_rules=self.switches.copies,
        )


def _figures(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Of all requests, then of each class of readers by its rate."""
    report = summarize(records)
    done = [record for record in records if record.ok]
    speeds = [(len(r.token_times) - 1) / (r.token_times[-1] - r.token_times[0]) for r in done if len(r.token_times) > 1]
    classes = sorted({record.stream_rate for record in done if record.stream_rate})
    return {
        "ttft_mean": report.ttft.mean,
        "ttft_p50": report.ttft.p50,
        "ttft_p99": report.ttft.p99,
        "effective": report.effective_throughput,
        "raw": report.output_throughput,
        "stall_mean": report.rebuffer.mean,
        "stall_p99": report.rebuffer.p99,
        "stalled_share": report.stalled_requests / max(report.completed, 1),
        "speed": float(np.median(speeds)),
        "e2el_mean": report.e2el.mean,
        "makespan": report.makespan,
        "completed": report.completed,
        "effective_tokens": report.effective_throughput * report.makespan,
        "classes": {f"{rate:g}": _as_read(done, rate) for rate in classes},
    }


def _as_read(done: Sequence[RequestRecord], rate: float) -> dict[str, float]:
    """What the readers of one rate got: tokens a second as read, and the share of their time that they stood still."""
    chosen = [record for record in done if record.stream_rate == rate and len(record.token_times) > 1]
    stalls = np.array([playback(record.token_times, rate).rebuffer_seconds for record in chosen])
    lengths = np.array([len(record.token_times) - 1 for record in chosen])
    delivered = lengths / (lengths / rate + stalls)
    return {"delivered": float(np.median(delivered)), "stall_share": float(stalls.sum() / (lengths / rate).sum())}


def _series(done: runner.Run) -> dict[str, list[float]]:
    """For pictures: all TTFTs, and over time who ran, who waited, and how much readers had left to read."""
    records = [record for record in done.records if record.ok]
    end = max(record.token_times[-1] for record in records)
    moments = np.linspace(0.0, end, _POINTS)
    load = done.load.columns()
    at = np.clip(np.searchsorted(load["times"], moments, side="right") - 1, 0, None)
    slack = _slack(records, moments)
    low, middle, high = np.nanpercentile(slack, [10, 50, 90], axis=0)
    columns = {
        "ttft": np.sort([record.token_times[0] - record.arrival for record in records]),
        "times": moments, "running": load["running"][at], "waiting": load["waiting"][at],
        "slack_p10": low, "slack_p50": middle, "slack_p90": high,
    }  # fmt: skip
    return {name: [round(float(value), 4) for value in column] for name, column in columns.items()}


def _slack(records: Sequence[RequestRecord], moments: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Seconds that each stream had left to read while it was being made, NaN otherwise; shape (records, moments).

    Where nobody streams there is nothing to read: one row of zeros stands for that.
    """
    table = np.full((len(records) + 1, len(moments)), np.nan)
    for row, record in zip(table, records, strict=False):
        times, rate = np.array(record.token_times), record.stream_rate or RATE
        schedule = np.arange(len(times)) / rate
        dry_at = np.maximum.accumulate(times - schedule) + schedule + 1.0 / rate
        made = np.searchsorted(times, moments, side="right")
        streaming = (made > 0) & (moments < times[-1])
        row[streaming] = np.maximum(0.0, dry_at[made[streaming] - 1] - moments[streaming])
    table[-1, np.isnan(table).all(axis=0)] = 0.0
    return table
