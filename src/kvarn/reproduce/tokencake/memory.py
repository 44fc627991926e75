"""E3 to E6: who holds memory, how much of it idles, who is put off for whom, and who is much slower than usual."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean

from kvarn.reproduce.contract import Row, Scope
from kvarn.reproduce.experiment import Part, Results
from kvarn.reproduce.statistics import difference, level, ratio
from kvarn.reproduce.tokencake import pictures
from kvarn.reproduce.tokencake.cells import System, slow_turns
from kvarn.reproduce.tokencake.contest import Contest, all_cells, contest
from kvarn.reproduce.tokencake.setups import OURS, RESIDENT, seeds, usual

_STRETCHES = (1.0, 4.0, 10.0)
"""Of tools' durations: with the table's, waiting agents hold little."""
_LONG = 10.0
"""The stretch at which bars are set: peaks of stalled agents are then what the paper's figure shows."""
_STATES = ("active", "stalled", "reserved", "pending", "loading", "cached", "free")
_STAYS = System(options=("stall=resident", "offload=off"), host=False)
"""Ours, with KV that stays where it is while tools run."""
_NAMES = {RESIDENT: "resident", _STAYS: "stays", OURS: "agentic"}


def _stretched(scope: Scope) -> dict[float, Contest]:
    """By how many times as long tools take."""
    panel = usual(scope)
    load = panel.load(scope, 1.0)
    return {
        stretch: contest(panel, replace(load, stretch=stretch * load.stretch), seeds(scope), RESIDENT, _STAYS, OURS)
        for stretch in ((_LONG,) if scope.quick else _STRETCHES)
    }


def utilisation(scope: Scope) -> Part:
    """E3."""
    contests = _stretched(scope)

    def effective(results: Results, each: Contest, system: System) -> list[float]:
        return [100 * run["contended"]["active"] for run in each.runs(results, system)]

    def rows(results: Results) -> list[Row]:
        made = []
        for stretch, each in contests.items():
            gain = difference(effective(results, each, OURS), effective(results, each, RESIDENT))
            words = " over ".join(f"{fmean(effective(results, each, system)):.3g}" for system in (OURS, RESIDENT))
            made.append(
                Row(f"e3.tools-{stretch:g}x.effective", "of the pool, what running requests hold while others wait, "
                    "agentic less resident", "points", gain, "simulated", 16.9, ">= 10" if stretch == _LONG else "",
                    f"{words} %; tools take {stretch:g} times the table's seconds; the paper's is of allocated blocks")
            )  # fmt: skip
            for system, name in _NAMES.items():
                for state in _STATES:
                    share = level([100 * run["shares"][state] for run in each.runs(results, system)])
                    made.append(
                        Row(f"e3.tools-{stretch:g}x.{name}.{state}", f"{state} blocks, {name}", "%", share, "simulated")
                    )
        return made

    def draw(results: Results, folder: Path) -> None:
        each = contests[_LONG]
        series = {_NAMES[system]: each.runs(results, system)[0]["series"] for system in (RESIDENT, OURS)}
        title = f"KV blocks, Code-Writer at 1 program/s, tools {_LONG:g} times the table's, simulated"
        pictures.draw_blocks(series, folder / "blocks.png", title)

    return Part("e3", "What the KV pool holds, by state", all_cells(contests.values()), rows, draw)


def idle(scope: Scope) -> Part:
    """E4."""
    contests = _stretched(scope)

    def rows(results: Results) -> list[Row]:
        made = []
        for stretch, each in contests.items():
            for system, name in _NAMES.items():
                runs, base = each.runs(results, system), system == RESIDENT
                id, note = f"e4.tools-{stretch:g}x.{name}", "the paper: 4.4 to 5.1 but for a spike" if base else ""
                for figure, words, known, bar, shares in (
                    ("contended", "while others wait", None, "< 2" if system == OURS else "",
                     [run["contended"]["stalled"] for run in runs]),
                    ("mean", "on average", 4.75 if base else None, "", [run["shares"]["stalled"] for run in runs]),
                    ("most", "at most", 18.5 if base else None, "", [run["most_stalled"] for run in runs]),
                ):  # fmt: skip
                    text = f"of the pool, held for waiting agents {words}, {name}"
                    share = level([100 * each for each in shares])
                    made.append(Row(f"{id}.{figure}", text, "%", share, "simulated", known, bar, note))
        return made

    return Part("e4", "What agents hold while their tools run", all_cells(contests.values()), rows)


def inversions(scope: Scope) -> Part:
    """E5."""
    panel = usual(scope)
    each = contest(panel, panel.load(scope, 1.0), seeds(scope))

    def rows(results: Results) -> list[Row]:
        made = []
        bars = (("inversions", "<= 0.2", "critical requests behind minor ones"), ("preemptions", "<= 1", "preemptions"))
        for figure, bar, words in bars:
            ours, base = each.values(results, figure, OURS), each.values(results, figure, RESIDENT)
            note = f"{fmean(ours):.4g} over {fmean(base):.4g}"
            text = f"{words}, ratio to resident"
            made.append(Row(f"e5.{figure}", text, "x", ratio(ours, base), "simulated", None, bar, note))
        for system in (RESIDENT, OURS):
            runs = each.runs(results, system)
            share = level([100 * run["inverted_preemptions"] / max(1, run["preemptions"]) for run in runs])
            known = 26 if system == RESIDENT else None
            text = f"of preemptions, those of critical requests for minor ones, {_NAMES[system]}"
            made.append(Row(f"e5.{_NAMES[system]}.share", text, "%", share, "simulated", known))
        return made

    return Part("e5", "Critical requests that minor ones put off", each.cells, rows)


def slowness(scope: Scope) -> Part:
    """E6."""
    panel = usual(scope)
    each = contest(panel, panel.load(scope, 1.0), seeds(scope))

    def rows(results: Results) -> list[Row]:
        ours, base = each.runs(results, OURS), each.runs(results, RESIDENT)
        counts = {
            "literal": ([slow_turns(run["turns"], run["turns"]) for run in ours], "its own system's mean"),
            "common": ([slow_turns(run["turns"], other["turns"]) for run, other in zip(ours, base, strict=True)],
                       "the baseline's mean"),
        }  # fmt: skip
        before = [slow_turns(run["turns"], run["turns"]) for run in base]
        made = []
        for name, (after, words) in counts.items():
            totals = [sum(found.values()) for found in after], [sum(found.values()) for found in before]
            worse = [f"{agent} {before[0][agent]} to {n}" for agent, n in after[0].items() if n > before[0][agent]]
            note = f"{fmean(totals[0]):.4g} over {fmean(totals[1]):.4g}; " + (
                f"more of them: {', '.join(worse)}" if worse else "no type has more of them"
            )
            made.append(
                Row(f"e6.{name}", f"turns slower than 1.5 times {words} of their type, ratio to resident", "x",
                    ratio(*totals), "simulated", 61 / 124, "<= 0.5", note)
            )  # fmt: skip
        for agent in before[0]:
            seconds = ratio([fmean(run["turns"][agent]) for run in ours], [fmean(run["turns"][agent]) for run in base])
            made.append(Row(f"e6.{agent.replace(' ', '-')}", f"mean turn of {agent}, ratio to resident", "x", seconds,
                            "simulated"))  # fmt: skip
        return made

    return Part("e6", "Agents much slower than usual", each.cells, rows)
