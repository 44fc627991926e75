"""X3, and X5 on this machine: what the prefill of a round takes, and what each step from one at a time to shared saves.

    recompute -> prefix      private histories are found in the cache
    serial    -> batched     one request at a time against all of a round together
    batched   -> copies      a choice of tokens for each against one of blocks for all
    copies    -> collective  a copy of shared text for each against all reading it in place

Weights and segments share one memory here, so there is nothing to load: "load once" is in the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from kvarn.reproduce.contract import Row, Scope
from kvarn.reproduce.experiment import Part, Results
from kvarn.reproduce.statistics import Estimate, ratio
from kvarn.reproduce.tokendance.players import Arm, configure, load, play_society
from kvarn.reproduce.tokendance.setups import BATCHED, COLLECTIVE, COPIES, EXACT, LEGO, SERIAL
from kvarn.serving.engine import Engine
from kvarn.simulation.rounds.capacity import most_holding
from kvarn.simulation.rounds.scenarios import Span
from kvarn.simulation.rounds.texts import SeededTexts
from kvarn.simulation.rounds.workload import RoundWorkload, draw_societies

_ARMS = {
    "prefix": EXACT, "serial": SERIAL, "batched": BATCHED, "copies": COPIES, "collective": COLLECTIVE, "lego": LEGO,
}  # fmt: skip
_STEPS = {
    "recompute.prefix": "recompute all over prefix caching",
    "serial.batched": "batching alone: one at a time over together",
    "batched.copies": "one choice of blocks for all: batched over collective with copies",
    "copies.collective": "sharing pages: collective with copies over in place",
    "batched.lego": "batched over first blocks, without looking",
    "prefix.collective": "prefix caching over collective",
}
_WORDS = (100, 30_000)
SLO_SECONDS = 1.5


@dataclass(frozen=True)
class _Society:
    """Rounds that are the same for everybody."""

    rounds: int = 5
    history: int = 192
    heard: int = 64
    seed: int = 0

    def tokens(self, agents: int) -> int:
        """Of all prompts of a round, generously."""
        return 2 * agents * (self.history + agents * (self.heard + 16) + 200)

    def play(self, engine: Engine, arm: Arm, agents: int, name: str) -> list[float]:
        """Seconds from a round's requests to its last first token; the first round computes histories."""
        spans = Span(self.history, self.history), Span(self.heard, self.heard)
        [spec] = draw_societies(RoundWorkload("school-play", agents, self.rounds, *spans, seed=self.seed))
        texts = SeededTexts(*_WORDS, self.seed)
        exact = arm.mode == "exact"
        if not exact:
            configure(engine, arm)
        played = play_society(engine, replace(spec, id=name), texts, segments=not exact, invented=texts)
        return [each.first_token_seconds for each in played]


_USUAL = _Society()


@dataclass(frozen=True)
class RoundPrefill:
    """The cell: seconds of each round, for all arms in turn on one engine, each with a society of its own."""

    agents: int
    society: _Society = _USUAL

    alone = True

    @property
    def cost(self) -> float:
        return float(self.agents)

    def run(self) -> dict[str, Any]:
        loaded = load(COLLECTIVE, tokens=self.society.tokens(self.agents), threads=0)
        engine, society = loaded.engine, self.society
        replace(society, rounds=2).play(engine, COLLECTIVE, self.agents, "warm-up")
        seconds = {name: society.play(engine, arm, self.agents, name)[1:] for name, arm in _ARMS.items()}
        repeats = range(society.rounds - 1)
        alone = replace(society, rounds=1)
        seconds["recompute"] = [alone.play(engine, EXACT, self.agents, f"new {i}")[0] for i in repeats]
        engine.close()
        return seconds


@dataclass(frozen=True)
class RealAgents:
    """The cell: the most agents whose rounds' prefill takes this machine `SLO_SECONDS` or less, median of rounds."""

    most: int = 24
    society: _Society = _USUAL

    alone = True
    cost = 20.0

    def run(self) -> dict[str, Any]:
        engine = load(COLLECTIVE, tokens=self.society.tokens(self.most), threads=0).engine
        self.society.play(engine, COLLECTIVE, 2, "warm-up")
        found = {name: self._most(engine, _ARMS[name], name) for name in ("prefix", "collective")}
        engine.close()
        return found

    def _most(self, engine: Engine, arm: Arm, name: str) -> int:
        def holds(agents: int) -> bool:
            return median(self.society.play(engine, arm, agents, f"{name} {agents}")[1:]) <= SLO_SECONDS

        return most_holding(holds, self.most)


def prefill(scope: Scope) -> Part:
    """X3."""
    society = _Society(3, 96, 48, scope.seed) if scope.quick else _Society(seed=scope.seed)
    agents = {"quick": (4,), "default": (2, 4, 10, 16), "full": (2, 4, 6, 8, 10, 12, 16)}[scope.level]
    cells = {count: RoundPrefill(count, society) for count in agents}

    def rows(results: Results) -> list[Row]:
        made = []
        for count, cell in cells.items():
            seconds = results[cell]

            def times(name: str, found: dict[str, Any] = seconds) -> Estimate:
                slow, fast = name.split(".")
                return ratio(found[slow], found[fast])

            note = f"{median(seconds['collective']):.2f} s against {median(seconds['serial']):.2f} s"
            ten = count == 10
            made += [
                Row(f"x3.n-{count}.serial", f"round prefill, serial reuse over collective, {count} agents", "x",
                    times("serial.collective"), "real", 2.57 if ten else None, ">= 1.9" if ten else "",
                    note + ("; the abstract says up to 1.9" if ten else "")),
                Row(f"x3.n-{count}.batched", "round prefill, batched reuse over collective", "x",
                    times("batched.collective"), "real", None, "> 1.0" if ten else ""),
                Row(f"x3.n-{count}.recompute", "round prefill, all computed anew over collective", "x",
                    times("recompute.collective"), "real", None, ">= 3.0" if ten else ""),
            ]  # fmt: skip
            made += [
                Row(f"x3.n-{count}.split.{name}", words, "x", times(name), "real") for name, words in _STEPS.items()
            ]
        return made

    return Part("x3", "Prefill of a round, and what saves how much of it", tuple(cells.values()), rows)


def real_agents(scope: Scope) -> tuple[RealAgents, ...]:
    """For X5: none in a quick run."""
    return () if scope.quick else (RealAgents(society=_Society(4, seed=scope.seed)),)


def real_rows(cells: tuple[RealAgents, ...], results: Results) -> list[Row]:
    """For X5."""
    return [
        Row("x5.real", "agents over prefix caching's within 1.5 s to the last first token, this machine", "x",
            Estimate(results[cell]["collective"] / results[cell]["prefix"]), "real", 2.7, ">= 2.0",
            f"{results[cell]['collective']} agents over {results[cell]['prefix']}")
        for cell in cells
    ]  # fmt: skip
