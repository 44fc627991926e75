"""E9 to E11: wrong forecasts, one mechanism at a time, and tools from a tenth of a second to a minute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kvarn.reproduce.contract import Row, Scope
from kvarn.reproduce.experiment import Part, Results
from kvarn.reproduce.statistics import Estimate, level
from kvarn.reproduce.tokencake import pictures
from kvarn.reproduce.tokencake.cells import System
from kvarn.reproduce.tokencake.contest import Contest, all_cells, contest
from kvarn.reproduce.tokencake.setups import OURS, RESIDENT, seeds, usual
from kvarn.simulation.agents.workload import Forecasts

STAYS = System(options=("stall=resident", "offload=off"), host=False)
"""Ours, with KV that stays where it is while tools run."""
EVICTABLE = System(options=("stall=finished", "offload=off"), host=False)
"""Ours, with KV that is prefix cache while tools run."""
_PLAIN_ORDER = ("order=conversation", "reserve=off", "preempt=off", "growth=0")
_ABLATED: dict[str, System] = {
    "none": System(options=(*_PLAIN_ORDER, "stall=resident", "offload=off"), host=False),
    "temporal": System(options=_PLAIN_ORDER),
    "spatial": STAYS,
    "reactive": System(options=("upload=reactive",)),
    "all-at-once": System(options=("gradual=off",)),
    "no-reserves": System(options=("reserve=off",)),
    "no-growth": System(options=("growth=0",)),
    "published": System(options=("like=published",)),
}
_WORDS = {
    "none": "first come, first served, KV stays",
    "temporal": "first come, first served, KV moves",
    "spatial": "in our order, KV stays",
    "reactive": "ours, back from the host when asked for",
    "all-at-once": "ours, blocks for a return taken at once",
    "no-reserves": "ours without reserves",
    "no-growth": "ours, admitted without room to grow",
    "published": "the paper's formulas to the letter",
}
_ERRORS = (0.0, 0.2, 0.5, 1.0, 2.0)
_WRONG: dict[str, tuple[Forecasts, str]] = {
    **{f"error-{error:.0%}".rstrip("%"): (Forecasts(error=error), "lognormal") for error in _ERRORS},
    "bias--50": (Forecasts(bias=-0.5), "lognormal"),
    "bias-100": (Forecasts(bias=1.0), "lognormal"),
    "pareto": (Forecasts(), "pareto"),
    "recorded": (Forecasts(), "recorded"),
}
"""What clients expect, and how long tools take."""
_GAPS = (0.1, 1.0, 10.0, 60.0)
_BESIDE: dict[str, tuple[System, str]] = {
    "resident": (STAYS, "the same with KV that stays"),
    "finished": (EVICTABLE, "the same with KV that is prefix cache"),
    "host-tier": (System(options=("stall=finished",)), "the same with prefix cache on device and host"),
    "ttl": (System(options=("like=ttl",), host=False), "KV kept 5 s"),
    "min-waste": (System(options=("like=min-waste",)), "InferCept's least waste"),
}


def forecasts(scope: Scope) -> Part:
    """E9."""
    panel = usual(scope)
    load, few = panel.load(scope, 1.0), ("error-0", "error-200", "pareto")
    chosen = {name: how for name, how in _WRONG.items() if not scope.quick or name in few}
    contests = {
        name: contest(panel, replace(load, forecasts=forecast, durations=law), seeds(scope), STAYS, OURS)
        for name, (forecast, law) in chosen.items()
    }

    def rows(results: Results) -> list[Row]:
        made = []
        for name, each in contests.items():
            made.append(
                each.over(results, base=STAYS, id=f"e9.{name}", what="agentic over the same with KV that stays",
                          bar="<= 1.02")
            )  # fmt: skip
            made += _returns(results, each, f"e9.{name}")
        return made

    return Part("e9", "Forecasts that are wrong", all_cells(contests.values()), rows)


def _returns(results: Results, each: Contest, id: str) -> list[Row]:
    """How conversations came back."""
    stalls = [run["stalls"] for run in each.runs(results)]
    return [
        Row(f"{id}.{name}", f"{name.replace('_', ' ')} of conversations", "count",
            level([float(run[name]) for run in stalls]), "simulated")
        for name in ("offloads", "uploads", "wasted_uploads")
    ]  # fmt: skip


def ablation(scope: Scope) -> Part:
    """E10."""
    panel = usual(scope)
    chosen = {n: s for n, s in _ABLATED.items() if not scope.quick or n in ("none", "temporal", "spatial")}
    each = contest(panel, panel.load(scope, 1.0), seeds(scope), RESIDENT, OURS, *chosen.values())
    known = {"temporal": 691.01 / 960.44, "spatial": 837.78 / 960.44, "both": 631.77 / 960.44}

    def rows(results: Results) -> list[Row]:
        note = "paper: total time of the authors' port, against prefix caching"
        return [
            each.over(results, system, id=f"e10.{name}", what=f"{words}, over resident", published=known.get(name),
                      note=note if name in known else "")
            for name, system, words in (
                *((name, system, _WORDS[name]) for name, system in chosen.items()), ("both", OURS, "ours"),
            )
        ]  # fmt: skip

    return Part("e10", "One mechanism at a time", each.cells, rows)


def gaps(scope: Scope) -> Part:
    """E11."""
    panel = usual(scope)
    load, systems = panel.load(scope, 1.0), (*(system for system, _ in _BESIDE.values()), OURS)
    contests = {
        gap: contest(
            panel, replace(load, durations=f"lognormal:{gap:g}"), seeds(scope), *systems
        )
        for gap in ((1.0, 10.0) if scope.quick else _GAPS)
    }  # fmt: skip

    def against(results: Results, each: Contest, name: str) -> Estimate:
        return each.ratio(results, base=_BESIDE[name][0])

    def rows(results: Results) -> list[Row]:
        made = []
        for gap, each in contests.items():
            id = f"e11.gap-{gap:g}"
            for name, (system, words) in _BESIDE.items():
                bar = "< 1" if name == "resident" and gap >= 5 else ""
                what = f"agentic over {words}"
                made.append(each.over(results, base=system, id=f"{id}.vs-{name}", what=what, bar=bar))
            better = max((against(results, each, name) for name in ("resident", "finished")), key=lambda e: e.value)
            made.append(
                Row(f"{id}.neutral", "agentic over the better of both forms that move nothing", "x", better,
                    "simulated", None, "<= 1.01" if gap <= 1 else "")
            )  # fmt: skip
        return made

    def draw(results: Results, folder: Path) -> None:
        curves = {name: [against(results, each, name).value for each in contests.values()] for name in _BESIDE}
        pictures.draw_gaps(list(contests), curves, folder / "gaps.png")

    return Part("e11", "Tools that take from a tenth of a second to a minute", all_cells(contests.values()), rows, draw)
