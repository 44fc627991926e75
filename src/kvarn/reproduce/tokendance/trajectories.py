"""X8: what agents say over many rounds at temperature 0, against exact reuse: where it first differs, and how much.

The floor: the same exact engine with other batches, which rounds differently. Divergence below it is nobody's fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from kvarn.reproduce.contract import Row, Scope
from kvarn.reproduce.experiment import Part, Results
from kvarn.reproduce.statistics import Estimate
from kvarn.reproduce.tokendance.players import Arm, load, play_society, scenario_texts
from kvarn.reproduce.tokendance.setups import BATCHED, COLLECTIVE, EXACT, LEGO, USUAL_SHARE
from kvarn.simulation.rounds.scenarios import SCENARIOS, Society, Span, scenarios_of
from kvarn.simulation.rounds.workload import RoundWorkload, draw_societies

_PLAIN = replace(EXACT, segments=False)
_ARMS = {
    "exact": EXACT,
    "floor": replace(EXACT, token_budget=64, max_running=2),
    "batched": replace(BATCHED, share=USUAL_SHARE),
    "collective": replace(COLLECTIVE, share=USUAL_SHARE),
    "collective-5": COLLECTIVE,
    "isolated": replace(COLLECTIVE, share=USUAL_SHARE, source="isolated"),
    "lego": LEGO,
}
_WORDS = {
    "exact": "exact reuse, told of rounds",
    "floor": "exact, at most 2 requests and 64 tokens at once: the noise floor",
    "batched": "batched, 15 % of tokens anew",
    "collective": "collective, 15 % of blocks anew",
    "collective-5": "collective, 5 % of blocks anew",
    "isolated": "collective, 15 % of blocks anew, segments encoded alone",
    "lego": "first block of each segment anew",
}
_SCENARIOS = tuple(each.name for each in scenarios_of(Society.generative))
assert len(_SCENARIOS) == 8 <= len(SCENARIOS)


@dataclass(frozen=True)
class Trajectories:
    """The cell: scenario -> rounds -> agents -> tokens said."""

    arm: Arm
    scenarios: tuple[str, ...] = _SCENARIOS
    agents: int = 4
    rounds: int = 10
    history: int = 64
    output: int = 20
    seed: int = 0

    alone = False

    @property
    def cost(self) -> float:
        return 0.1 * len(self.scenarios) * self.rounds * self.agents

    def run(self) -> dict[str, Any]:
        tokens = 4 * self.agents * (self.history + self.agents * (self.output + 8) + 300)
        loaded = load(self.arm, tokens=tokens, threads=1)
        texts, eos = scenario_texts(loaded, self.seed), frozenset(loaded.spec.eos_tokens)
        said: dict[str, Any] = {}
        for name in self.scenarios:
            spans = Span(self.history, self.history), Span(self.output, self.output)
            workload = RoundWorkload(name, self.agents, self.rounds, *spans, task_tokens=40, seed=self.seed)
            [spec] = draw_societies(workload)
            segments = self.arm.segments
            played = play_society(loaded.engine, spec, texts, segments=segments, eos_tokens=eos)
            said[name] = [each.said for each in played]
        loaded.engine.close()
        return said


def trajectories(scope: Scope) -> Part:
    """X8."""
    levels: dict[str, dict[str, Any]] = {
        "quick": {"scenarios": _SCENARIOS[:2], "rounds": 2, "agents": 3, "output": 20, "history": 48},
        "default": {"output": 36},
        "full": {"agents": 6, "output": 64, "history": 128},
    }
    base = Trajectories(_PLAIN, seed=scope.seed, **levels[scope.level])
    names = ("exact", "floor", "collective-5", "lego") if scope.quick else tuple(_ARMS)
    cells = {name: replace(base, arm=_ARMS[name]) for name in names}
    count = len(base.scenarios)

    def rows(results: Results) -> list[Row]:
        made = []
        for name, cell in cells.items():
            found = [compared(results[cell][each], results[base][each]) for each in base.scenarios]
            identical = sum(each.identical == 1.0 for each in found)
            bar = f"= {count}" if name == "exact" else ""
            published = 3.0 if name not in ("exact", "floor") and count == 8 else None
            edits = fmean(each.edits for each in found)
            figures = [
                ("identical", f"of {count} scenarios, the same from beginning to end", "scenarios", float(identical),
                 published, bar),
                ("first", f"rounds before the first difference, of {base.rounds}", "rounds",
                 fmean(each.first for each in found), None, ""),
                ("answers", "answers that are the same", "x", fmean(each.identical for each in found), None, ""),
                ("edits", "tokens to change, of an answer's length", "x", edits, None, ""),
            ]  # fmt: skip
            made += [
                Row(f"x8.{name}.{id}", f"{text}; {_WORDS[name]}", unit, Estimate(value), "real", paper, asked)
                for id, text, unit, value, paper, asked in figures
            ]
        return made

    return Part("x8", "What agents say, round after round", (base, *cells.values()), rows)


@dataclass(frozen=True)
class Compared:
    """One scenario by two engines."""

    first: int
    """Rounds before the first that differs; all of them where none does."""
    identical: float
    """Of the answers."""
    edits: float
    """Edit distance of an answer to the other, over the longer one's tokens; mean of all."""


Words = Sequence[Sequence[Sequence[int]]]
"""Rounds, agents, tokens."""


def compared(ours: Words, theirs: Words) -> Compared:
    """Both have the same rounds and agents."""
    differs = [list(map(list, one)) != list(map(list, other)) for one, other in zip(ours, theirs, strict=True)]
    pairs = [pair for one, other in zip(ours, theirs, strict=True) for pair in zip(one, other, strict=True)]
    identical = fmean(list(one) == list(other) for one, other in pairs)
    edits = fmean(edit_distance(one, other) / max(1, len(one), len(other)) for one, other in pairs)
    return Compared(differs.index(True) if any(differs) else len(differs), identical, edits)


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens to insert, remove or replace."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]
