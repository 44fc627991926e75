"""E5 to E7 and E10: mixed and faster readers, the two knobs, and what the paper does not try."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kvarn.reproduce.contract import Row, Scope
from kvarn.reproduce.experiment import Part, Results
from kvarn.reproduce.statistics import level
from kvarn.reproduce.tokenflow.cells import RATE, Load, Simulated, Switches
from kvarn.reproduce.tokenflow.contest import GREEDY, OURS, Contest, all_cells, qos
from kvarn.reproduce.tokenflow.setups import BURSTS, SHORT_BURST, Setup
from kvarn.serving.policies.streaming.settings import StreamingSettings

_MIXED = ((0.4, 15.0), (0.6, 20.0))
"""Share and rate of each class."""
_FASTER = {20.0: 1.537, 25.0: 1.487, 30.0: 1.529}
"""Rate -> the paper's effective throughput over its baseline's; which figure is of which rate is not certain."""
_PENALTIES = ((1.0, 1.0), (10.0, 10.0), (20.0, 20.0), (20.0, 100.0))
"""Weights of TTFT and stalls (tokens per second) in the QoS: lambda and mu."""


def _setups(scope: Scope) -> tuple[Setup, ...]:
    """Where there is time for one load only, that of the small device."""
    return BURSTS[:1] if scope.quick else (BURSTS[0], SHORT_BURST)


def mixed_rates(scope: Scope) -> Part:
    """Two classes of readers: does each get what it reads?"""
    contests = {
        setup.id: Contest(replace(setup.load, readers=_MIXED), setup.device, tuple(scope.seeds))
        for setup in _setups(scope)
    }

    def rows(results: Results) -> list[Row]:
        made = []
        for id, contest in contests.items():
            for _, rate in _MIXED:
                name = f"{rate:g}"
                found = [results[contest.cell(OURS, seed)]["classes"][name] for seed in contest.seeds]
                theirs = [results[contest.cell(GREEDY, seed)]["classes"][name]["stall_share"] for seed in contest.seeds]
                delivered = level([one["delivered"] / rate for one in found])
                stalls = level([one["stall_share"] for one in found])
                note = f"fcfs {level(theirs).value:.3g}"
                made += [
                    Row(f"e5.{id}.delivered-{name}", f"median rate as read, readers of {name} tokens/s", "of theirs",
                        delivered, "simulated", 1.0, "0.95 to 1.05", "paper: each class holds its rate"),
                    Row(f"e5.{id}.stalls-{name}", f"time stalled, readers of {name} tokens/s", "of reading time",
                        stalls, "simulated", None, "< 0.01", note),
                ]  # fmt: skip
        return made

    return Part("e5", "Mixed readers: 40 % of 15 and 60 % of 20 tokens/s", all_cells(contests.values()), rows)


def faster_readers(scope: Scope) -> Part:
    """All readers as fast as the paper's fastest."""
    contests = {
        (setup.id, rate): Contest(replace(setup.load, readers=((1.0, rate),)), setup.device, tuple(scope.seeds))
        for setup in _setups(scope)
        for rate in _FASTER
    }

    def rows(results: Results) -> list[Row]:
        made = []
        for (id, rate), contest in contests.items():
            known = {"effective": (_FASTER[rate], ">= 1.45"), "ttft_p99": (None, ""), "stall_mean": (None, "")}
            for figure, (published, bar) in known.items():
                row = f"e6.{id}.rate-{rate:g}.{figure}"
                made.append(contest.over(results, figure, id=row, published=published, bar=bar))
            made.append(contest.over(results, "effective", GREEDY, id=f"e6.{id}.rate-{rate:g}.effective"))
        return made

    return Part("e6", "Readers of 20, 25 and 30 tokens/s", all_cells(contests.values()), rows)


def knobs(scope: Scope) -> Part:
    """How often to look (Delta t) and how much slack to ask for (mu)."""
    values = {
        "tick": (StreamingSettings.tick, 2.0) if scope.quick else (0.25, 0.5, 1.0, 2.0),
        "safety": (1.0, 20.0) if scope.quick else (1.0, 2.0, 5.0, 20.0),
    }
    setups = BURSTS[1:2] if scope.quick else (BURSTS[1], SHORT_BURST)
    plain = {setup.id: Contest(setup.load, setup.device, tuple(scope.seeds)) for setup in setups}
    changed = {
        (setup.id, name, value): replace(plain[setup.id], policies=(OURS,), switches=_switch(name, value))
        for setup in setups
        for name in values
        for value in values[name]
    }

    def rows(results: Results) -> list[Row]:
        made = []
        for (id, name, value), contest in changed.items():
            row = f"e7.{id}.{name}-{value:g}"
            note = "paper: shorter is marginally better" if name == "tick" else "paper: 1 is agile, 20 like SGLang"
            made += [
                contest.row(results, "ttft_p99", id=f"{row}.ttft_p99", note=note),
                contest.row(results, "stall_mean", id=f"{row}.stall_mean"),
                contest.row(results, "effective", id=f"{row}.effective"),
            ]
        for id, contest in plain.items():
            made += [
                contest.row(results, figure, policy, id=f"e7.{id}.{policy}.{figure}", note="for comparison")
                for policy in contest.policies
                for figure in ("ttft_p99", "effective")
            ]
        return made

    cells = all_cells((*plain.values(), *changed.values()))
    return Part("e7", "Time between looks, and the margin of safety", cells, rows)


def _switch(name: str, value: float) -> Switches:
    """Nothing where that is the default: such cells are others' as well."""
    return Switches() if getattr(StreamingSettings, name) == value else Switches((f"{name}={value:g}",))


# ---- beyond the paper ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Twist:
    """What is unusual about a load."""

    title: str
    load: Load


def _twists(load: Load) -> dict[str, _Twist]:
    return {
        "declared-half": _Twist("clients say half of their rate", replace(load, declared=0.5)),
        "declared-double": _Twist("clients say twice their rate", replace(load, declared=2.0)),
        "skimmers": _Twist("a fifth skims at 100 tokens/s", replace(load, readers=((0.8, RATE), (0.2, 100.0)))),
        "abandoned": _Twist("a third leaves after 5 s on average", replace(load, leaving=(0.33, 5.0))),
        "overload": _Twist("readers of 60 tokens/s: more than the device makes", replace(load, readers=((1.0, 60.0),))),
        "unknown-lengths": _Twist("all ask for up to 4,096 tokens", replace(load, asked=4096)),
        "shared-prefix": _Twist("256 tokens of all prompts are the same", replace(load, shared_tokens=256)),
    }


def beyond(scope: Scope) -> Part:
    """Wrong rates, skimmers, people who leave, too much to read, shared prefixes; quality of service by its formula."""
    seeds = tuple(scope.seeds)
    usual = {setup.id: Contest(setup.load, setup.device, seeds) for setup in _setups(scope)}
    twisted = {
        (setup.id, name): (twist, Contest(twist.load, setup.device, seeds))
        for setup in _setups(scope)
        for name, twist in _twists(setup.load).items()
    }

    def rows(results: Results) -> list[Row]:
        made = []
        for (id, name), (twist, contest) in twisted.items():
            row = f"e10.{id}.{name}"
            made.append(contest.over(results, "ttft_p99", id=f"{row}.ttft_p99", note=twist.title))
            made += [contest.over(results, one, id=f"{row}.{one}") for one in ("ttft_mean", "effective", "raw")]
            made.append(contest.over(results, "stall_mean", id=f"{row}.stall_mean", bar="<= 0"))
            made += [contest.over(results, one, GREEDY, id=f"{row}.{one}") for one in ("ttft_p99", "stall_mean")]
            made += [contest.row(results, one, id=f"{row}.{one}-ours") for one in ("stalled_share", "completed")]
        for id, contest in usual.items():
            made += _stalls(results, contest, f"e10.{id}")
            made += _qos_rows(results, contest, f"e10.{id}")
        return made

    cells = all_cells((*usual.values(), *(contest for _, contest in twisted.values())))
    return Part("e10", "Beyond the paper: wrong rates, skimmers, departures, overload, prefixes, QoS", cells, rows)


def _stalls(results: Results, contest: Contest, id: str) -> list[Row]:
    figures = ("stall_mean", "stall_p99", "stalled_share")
    return [
        contest.row(results, figure, policy, id=f"{id}.{policy}.{figure}")
        for policy in contest.policies
        for figure in figures
    ]


def _qos_rows(results: Results, contest: Contest, id: str) -> list[Row]:
    cells: Mapping[str, list[Simulated]] = {
        policy: [contest.cell(policy, seed) for seed in contest.seeds] for policy in contest.policies
    }
    return [
        Row(f"{id}.{policy}.qos-{waiting:g}-{stalling:g}", f"QoS (lambda {waiting:g}, mu {stalling:g}), {policy}",
            "tokens/s", qos(results, chosen, waiting, stalling), "simulated")
        for waiting, stalling in _PENALTIES
        for policy, chosen in cells.items()
    ]  # fmt: skip
