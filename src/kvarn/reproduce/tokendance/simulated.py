"""Cells of X5 and X10: the real engine on a virtual clock, over a modelled device, with societies of agents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvarn.hardware.accelerators import load_accelerator
from kvarn.hardware.models import load_model_shape
from kvarn.reproduce.tokendance.players import Arm
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Engine
from kvarn.serving.rounds.settings import ReuseSettings
from kvarn.simulation.assemble import simulated_engine
from kvarn.simulation.rounds.capacity import most_agents
from kvarn.simulation.rounds.player import play_rounds
from kvarn.simulation.rounds.report import RoundsRun, Until
from kvarn.simulation.rounds.scenarios import HISTORY, Span, find_scenario
from kvarn.simulation.rounds.workload import RoundWorkload, draw_societies

_ANSWERS = Span(32, 64)
PERCENTILES = (50.0, 95.0)


@dataclass(frozen=True)
class Crowd:
    """Societies that come one after another, `qps` rounds a second in all; 0: one alone."""

    scenario: str
    qps: float = 0.0
    rounds: int = 8
    societies: int = 1
    output: Span = _ANSWERS
    history: Span | None = None
    visibility: float = 1.0
    stragglers: float = 0.0
    think_seconds: float = 0.2

    def workload(self, agents: int, seed: int) -> RoundWorkload:
        return RoundWorkload(
            self.scenario, agents, self.rounds, self.history, self.output, visibility=self.visibility,
            stragglers=self.stragglers, think_seconds=self.think_seconds, societies=self.societies, qps=self.qps,
            seed=seed,
        )  # fmt: skip

    def tokens(self, agents: int) -> float:
        """What the agents of one society read and say, about."""
        span = HISTORY[find_scenario(self.scenario).society] if self.history is None else self.history
        return agents * (span.high + self.rounds * agents * self.output.high)


@dataclass(frozen=True)
class Capacity:
    """The cell: the most agents within a limit, and the rounds of every trial."""

    crowd: Crowd
    model: str
    arm: Arm
    slo: float
    percentile: float = 95.0
    until: Until = "end"
    most: int = 40
    seed: int = 0
    hardware: str = "a100-80"

    alone = False

    @property
    def cost(self) -> float:
        return self.crowd.societies / max(1.0, self.crowd.qps) * (1 if self.arm.mode == "exact" else 4)

    def run(self) -> dict[str, Any]:
        trials: dict[str, dict[str, float]] = {}

        def note(agents: int, run: RoundsRun) -> None:
            trials[f"{agents}"] = _figures(run)

        found = most_agents(
            lambda: simulated(self.hardware, self.model, self.arm), self.crowd.workload(0, self.seed), self.slo,
            self.percentile, most=self.most, until=self.until, on_run=note,
        )  # fmt: skip
        return {"agents": found, "trials": trials}


@dataclass(frozen=True)
class Rounds:
    """The cell: rounds of societies of so many agents."""

    crowd: Crowd
    agents: int
    model: str
    arm: Arm
    seed: int = 0
    hardware: str = "a100-80"

    alone = False

    @property
    def cost(self) -> float:
        return 1e-4 * self.crowd.societies * self.crowd.tokens(self.agents)

    def run(self) -> dict[str, Any]:
        engine = simulated(self.hardware, self.model, self.arm)
        run = play_rounds(engine, draw_societies(self.crowd.workload(self.agents, self.seed)))
        engine.close()
        summary = run.summary()
        names = ("prompt_tokens", "computed_tokens", "preemptions", "peak_blocks")
        return _figures(run) | {name: summary[name] for name in names}


def simulated(hardware: str, name: str, arm: Arm) -> Engine:
    """An engine over a device of the table, all of its memory for weights and KV."""
    accelerator, model = load_accelerator(hardware), load_model_shape(name)
    config = EngineConfig(
        model=name, token_budget=accelerator.token_budget, prefill_budget=accelerator.prefill_budget,
        max_running=accelerator.max_running, host_memory_bytes=0, speculation="off",
    )  # fmt: skip
    reuse = (
        None
        if arm.mode == "exact"
        else ReuseSettings(arm.mode, arm.share, share_blocks=arm.share_blocks, source=arm.source)
    )
    return simulated_engine(config, accelerator, model, reuse=reuse)


def _figures(run: RoundsRun) -> dict[str, float]:
    """Seconds of rounds but the first ones."""
    first = 1 if any(record.round for record in run.rounds) else 0
    figures = {f"p{each:g}": run.round_percentile(each, first) for each in PERCENTILES}
    figures |= {f"first_token_p{each:g}": run.round_percentile(each, first, "first_token") for each in PERCENTILES}
    return figures | {"failures": float(len(run.failures))}
