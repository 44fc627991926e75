"""X10: where collective reuse gains less: agents that see different texts, long histories, some who come late."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from kvarn.reproduce.contract import Row, Scope
from kvarn.reproduce.experiment import Cell, Part, Results
from kvarn.reproduce.statistics import level, ratio
from kvarn.reproduce.tokendance.caching import Caches
from kvarn.reproduce.tokendance.setups import COLLECTIVE, EXACT, seeds
from kvarn.reproduce.tokendance.simulated import Crowd, Rounds
from kvarn.simulation.rounds.scenarios import Span

_AGENTS = 16
_BASE = Crowd("school-play", rounds=6)


@dataclass(frozen=True)
class _Case:
    id: str
    words: str
    crowd: Crowd


def _cases(scope: Scope) -> list[_Case]:
    made = [
        _Case(f"visibility-{share:g}", f"each sees {share:.0%} of what is said", replace(_BASE, visibility=share))
        for share in (0.25, 0.5, 0.75, 1.0)
    ]
    made += [
        _Case(f"history-{tokens}", f"histories of {tokens} tokens", replace(_BASE, history=Span(tokens, tokens)))
        for tokens in (128, 1024, 4096)
    ]
    made += [
        _Case(f"late-{share:g}", f"{share:.0%} of requests 0.2 s late, on average", replace(_BASE, stragglers=share))
        for share in (0.1, 0.5)
    ]
    return made[1::3] if scope.quick else made


def sensitivity(scope: Scope) -> Part:
    """X10."""
    cases = _cases(scope)
    pairs = {
        case.id: [
            tuple(Rounds(case.crowd, _AGENTS, "qwen2-7b", arm, seed) for seed in seeds(scope))
            for arm in (EXACT, COLLECTIVE)
        ]
        for case in cases
    }
    sizes: dict[str, Any] = {"agents": 4, "rounds": 2, "output": Span(96, 128)} if scope.quick else {}
    stored = {
        share: tuple(Caches(COLLECTIVE, text="seeded", visibility=share, seed=seed, **sizes) for seed in seeds(scope))
        for share in ((0.5, 1.0) if scope.quick else (0.25, 0.5, 0.75, 1.0))
    }

    def rows(results: Results) -> list[Row]:
        made = []
        for case in cases:
            base, ours = pairs[case.id]
            for figure, text in (("p50", "a round"), ("first_token_p50", "a round's prefill")):
                seconds = [[results[cell][figure] for cell in group] for group in (base, ours)]
                what = f"P50 of {text}, prefix caching over collective, {_AGENTS} agents; {case.words}"
                id = f"x10.{case.id}" + (".prefill" if figure != "p50" else "")
                made.append(Row(id, what, "x", ratio(*seconds), "simulated"))
        for share, group in stored.items():
            found = [results[cell]["stored"]["16/0"] for cell in group]
            text = f"times smaller, shared text of {group[0].agents} agents who see {share:.0%} of it"
            made += [
                Row(f"x10.stored.visibility-{share:g}.{figure}", f"{text}; {words}", "x",
                    level([each[figure] for each in found]), "real")
                for figure, words in (("mean", "a mirror"), ("group", "all together"))
            ]  # fmt: skip
        return made

    cells: list[Cell] = [cell for pair in pairs.values() for group in pair for cell in group]
    cells += [cell for group in stored.values() for cell in group]
    return Part("x10", "What makes it gain less", tuple(cells), rows)
