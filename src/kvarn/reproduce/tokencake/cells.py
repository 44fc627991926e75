"""One simulated run of a batch of programs: conditions and seed in, figures out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.serving.config import EngineConfig, PolicyName
from kvarn.serving.engine import Engine
from kvarn.serving.policies.agentic.inversions import Metered
from kvarn.simulation.agents.player import play_programs
from kvarn.simulation.agents.progress import Events
from kvarn.simulation.agents.report import ABNORMAL, AgentRun
from kvarn.simulation.agents.tools import DurationLaw, parse_law
from kvarn.simulation.agents.workload import AgentWorkload, Forecasts, draw_programs
from kvarn.simulation.assemble import simulated_engine
from kvarn.simulation.workloads import Poisson

_POINTS = 240
"""Moments at which a picture looks."""
_BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Load:
    """Programs that come independently, `qps` a second, until there have been so many."""

    app: str
    data_set: str
    programs: int
    qps: float
    durations: str = "lognormal"
    """A law as `parse_law` reads it."""
    stretch: float = 1.0
    """Every tool takes so many times as long."""
    forecasts: Forecasts = field(default=Forecasts())
    token_scale: float = 1.0

    def workload(self, seed: int) -> AgentWorkload:
        return AgentWorkload(
            self.app, self.data_set, self.programs, Poisson(self.qps),
            _Stretched(parse_law(self.durations), self.stretch), self.forecasts, self.token_scale, seed,
        )  # fmt: skip


@dataclass(frozen=True)
class _Stretched:
    """A law whose calls all take so many times as long."""

    law: DurationLaw
    factor: float

    def draw(self, kind: str, rng: np.random.Generator) -> float:
        return self.factor * self.law.draw(kind, rng)

    def typical(self, kind: str) -> float:
        return self.factor * self.law.typical(kind)


@dataclass(frozen=True)
class Device:
    """What serves: a device of the table, a model, and its KV blocks of 16 tokens."""

    hardware: str
    model: str
    blocks: int
    host_gigabytes: int = 100


@dataclass(frozen=True)
class System:
    """Who decides, and what it is told."""

    policy: PolicyName = "agentic"
    options: tuple[str, ...] = ()
    host: bool = True
    """Whether it has host memory."""
    events: Events = Events.explicit
    hints: bool = True


@dataclass(frozen=True)
class Simulated:
    """A cell: one load, device, system and seed."""

    load: Load
    device: Device
    system: System = field(default=System())
    seed: int = 0

    alone = False

    @property
    def cost(self) -> float:
        tokens = {"d1": 1.0, "d2": 2.5}[self.load.data_set] * self.load.token_scale
        return tokens * self.load.programs * (2.0 if self.system.policy == "agentic" else 1.0)

    def run(self) -> dict[str, Any]:
        engine = self._engine()
        meter = engine.policy = Metered(engine.policy)
        specs = draw_programs(self.load.workload(self.seed))
        done = play_programs(engine, specs, events=self.system.events, hints=self.system.hints)
        figures = _figures(done, self.device.blocks) | {"work": _digest(done)}
        figures |= {
            "preemptions": meter.counters.preemptions, "inversions": meter.counters.inversions,
            "inverted_preemptions": meter.counters.inverted_preemptions,
        }  # fmt: skip
        if engine.agents is not None:
            counters = engine.agents.held.counters
            figures["stalls"] = {name: getattr(counters, name) for name in counters.__slots__}
        return figures | {"series": _series(done)}

    def _engine(self) -> Engine:
        accelerator, model = load_accelerator(self.device.hardware), load_model_shape(self.device.model)
        config = EngineConfig(
            model=model.name,
            policy=self.system.policy,
            policy_options=self.system.options,
            token_budget=accelerator.token_budget,
            prefill_budget=accelerator.prefill_budget,
            max_running=accelerator.max_running,
            kv_memory_bytes=int(self.device.blocks * _BLOCK_TOKENS * model.kv_bytes_per_token(2)),
            host_memory_bytes=int(self.device.host_gigabytes * 1e9) if self.system.host else 0,
            speculation="off",
        )
        return simulated_engine(config, accelerator, model)


def _figures(done: AgentRun, blocks: int) -> dict[str, Any]:
    summary = done.summary()
    turns: dict[str, list[float]] = {}
    for turn in done.turns():
        turns.setdefault(turn.agent, []).append(round(turn.seconds, 2))
    names = ("programs", "completed", "mean_seconds", "p50_seconds", "p95_seconds", "makespan",
             "prompt_tokens", "cached_tokens", "output_tokens")  # fmt: skip
    return {name: summary[name] for name in names} | {
        "shares": {name: held / blocks for name, held in summary["mean_blocks"].items()},
        "contended": {name: held / blocks for name, held in summary["mean_blocks_contended"].items()},
        "most_stalled": max(done.blocks.states.get("stalled", [0]), default=0) / blocks,
        "turns": turns,
        "refused": sum(done.refused.values()),
    }


def _digest(done: AgentRun) -> str:
    """Of all the work that was done: equal between systems that are compared."""
    return hashlib.blake2b(repr(sorted(done.work().items())).encode(), digest_size=12).hexdigest()


def _series(done: AgentRun) -> dict[str, list[float]]:
    """For pictures: blocks by state and how many wait, at some moments."""
    columns = done.blocks.columns()
    moments = np.linspace(0.0, columns["times"][-1], _POINTS)
    at = np.clip(np.searchsorted(columns["times"], moments, side="right") - 1, 0, None)
    return {"times": moments.round(2).tolist()} | {
        name: values[at].tolist() for name, values in columns.items() if name != "times"
    }


def slow_turns(turns: Mapping[str, Sequence[float]], usual: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """Type of agent -> turns that take more than 1.5 times what its type takes on average in `usual`."""
    return {
        agent: int(np.count_nonzero(np.array(seconds) > ABNORMAL * np.mean(usual[agent])))
        for agent, seconds in turns.items()
    }
