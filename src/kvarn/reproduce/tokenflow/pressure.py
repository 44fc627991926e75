"""E1 to E4: what first come, first served does to those who wait; what streaming makes of bursts, streams, traces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from kvarn.reproduce.contract import Row, Scope
from kvarn.reproduce.experiment import Part, Results
from kvarn.reproduce.statistics import level, ratio
from kvarn.reproduce.tokenflow import pictures
from kvarn.reproduce.tokenflow.cells import RATE, Device, Load, Switches
from kvarn.reproduce.tokenflow.contest import BASELINE, FIGURES, GREEDY, OURS, Contest, all_cells
from kvarn.reproduce.tokenflow.setups import BURSTS, H200, H200_32B, RTX4090, SHORT_BURST, Setup, stream, trace
from kvarn.serving.config import PolicyName
from kvarn.simulation.workloads import Gamma

_FULL_LOAD = {RTX4090: 1.1, H200: 3.7}
"""Requests a second that a saturated device serves: burst (a) made longer, with memory reserved."""
_CLUMPS = 3.0
"""Coefficient of variation of the gaps between requests where the paper has a production trace."""
_TRACE_RATES = {RTX4090: {"": 1.5, "busy": 1.8}, H200_32B: {"": 3.0, "busy": 3.6}}
"""Requests a second: their bursts are more than the device can serve at once; by day, when busy, so is their mean."""
PACED: PolicyName = "fcfs-paced"
QOE: PolicyName = "qoe-recompute"


class _Claim(NamedTuple):
    """A figure, what the paper has for the ratio to its baseline, and our bar."""

    figure: str
    published: float | None
    bar: str


_BURST = (
    _Claim("ttft_p99", 0.198, "<= 0.25"),
    _Claim("ttft_mean", 0.516, "<= 0.5"),
    _Claim("effective", 1.529, ">= 1.5"),
    _Claim("raw", None, ">= 0.97"),
    _Claim("stall_mean", None, "<= 0"),
)
_STREAM = (
    _Claim("effective", 1.825, ">= 1.8"),
    _Claim("ttft_mean", 0.463, ""),
    _Claim("ttft_p99", None, ""),
    _Claim("raw", None, ""),
    _Claim("stall_mean", None, ""),
)
_TRACE = (
    _Claim("ttft_mean", 0.474, "<= 0.5"),
    _Claim("ttft_p50", 0.113, "<= 0.15"),
    _Claim("effective", None, ">= 1.4"),
    _Claim("ttft_p99", None, ""),
    _Claim("raw", None, ""),
    _Claim("stall_mean", None, ""),
)
_TRACE_EFFECTIVE = {RTX4090: 1.451, H200_32B: 1.371}
"""The paper's, of an A6000 and an H200."""


def motivation(scope: Scope) -> Part:
    """Requests of burst (a)'s lengths that come at half and all of what the device serves."""
    loads = (0.5, 1.0)
    minutes = 2
    contests = {
        (setup.device.name, share): Contest(
            _clumped(setup, share * _FULL_LOAD[setup.device], minutes * 60),
            setup.device,
            tuple(scope.seeds),
            (BASELINE, GREEDY),
        )
        for setup in (BURSTS[0],) + (() if scope.quick else (BURSTS[2],))
        for share in loads
    }

    def rows(results: Results) -> list[Row]:
        made = []
        for (device, share), contest in contests.items():
            for policy in (BASELINE, GREEDY):
                id = f"e1.{device}.load-{share:g}.{policy}"
                waits, speed = ("> 1.3", "> 40") if share == 1.0 and policy == BASELINE else ("", "")
                note = "paper: a production trace, peak"
                made += [
                    contest.row(results, "ttft_p99", policy, id=f"{id}.ttft_p99", bar=waits, published=20, note=note),
                    contest.row(results, "speed", policy, id=f"{id}.speed", bar=speed, published=30),
                ]
        return made

    return Part("e1", "Motivation: first come, first served at load 0.5 and 1", all_cells(contests.values()), rows)


def _clumped(setup: Setup, rate: float, seconds: float) -> Load:
    return replace(setup.load, requests=round(rate * seconds), arrivals=Gamma(rate, _CLUMPS))


def bursts(scope: Scope) -> Part:
    """Bursts (a) and (b), and every baseline."""
    setups = (*BURSTS[:2], SHORT_BURST) if scope.quick else BURSTS
    policies = (BASELINE, GREEDY, PACED, QOE, OURS)
    contests = {s.id: Contest(s.load, s.device, tuple(scope.seeds), policies, pictured=True) for s in setups}
    paced = {id: _always_paused(contest) for id, contest in contests.items()}

    def rows(results: Results) -> list[Row]:
        made = []
        for id, contest in contests.items():
            for figure, published, bar in _BURST:
                made.append(contest.over(results, figure, id=f"e2.{id}.{figure}", published=published, bar=bar))
            made.append(contest.row(results, "stall_mean", id=f"e2.{id}.stall"))
            made.append(_floor(results, contest, f"e2.{id}.ttft_floor"))
            made += _beside_pacing(results, contest, paced[id], f"e2.{id}")
            for other in (GREEDY, QOE):
                made += [contest.over(results, figure, other, id=f"e2.{id}.{figure}") for figure, _, _ in _BURST]
            made.append(contest.row(results, "stall_mean", GREEDY, id=f"e2.{id}.stall-{GREEDY}"))
        return made

    def draw(results: Results, folder: Path) -> None:
        for id, contest in contests.items():
            title = f"Burst {id}, simulated, seed {contest.seeds[0]}"
            pictures.draw_burst(contest.pictured_runs(results), folder / f"burst-{id}.png", title)

    title = "Bursts (a) and (b) against every baseline"
    return Part("e2", title, all_cells((*contests.values(), *paced.values())), rows, draw)


def _always_paused(contest: Contest) -> Contest:
    """Ours at the same load, when it paces its readers even while nobody needs the device."""
    return replace(contest, policies=(OURS,), switches=Switches(("pause=always",)), pictured=False)


def _beside_pacing(results: Results, contest: Contest, paced: Contest, id: str) -> list[Row]:
    """Against first come, first served with pacing: as it is, and with both pacing all the time."""
    made = []
    for figure, bar in (("ttft_p99", "< 1"), ("effective", ">= 1"), ("raw", "")):
        made.append(contest.over(results, figure, PACED, id=f"{id}.{figure}", bar=bar))
        values = ratio(paced.values(results, figure), contest.values(results, figure, PACED))
        text, _ = FIGURES[figure]
        metric = f"{text}, ratio of pause=always to {PACED}"
        made.append(Row(f"{id}.{figure}.always.vs-{PACED}", metric, "x", values, "simulated", None, bar))
    return made


def _floor(results: Results, contest: Contest, id: str) -> Row:
    """What the last TTFT cannot be below if nobody is to stall: the last token is read within a text's reading time of
    its first one, so at this throughput somebody begins no sooner than a reading time before the end."""
    floors = []
    for seed in contest.seeds:
        reading = max((spec.output_tokens / (spec.stream_rate or RATE)) for spec in contest.load.specs(seed))
        floors.append(max(0.0, results[contest.cell(OURS, seed)]["makespan"] - reading))
    theirs = contest.values(results, "ttft_p99", BASELINE)
    metric = f"last TTFT without stalls at our throughput, at best, ratio to {BASELINE}'s P99"
    floor = level([ours / other for ours, other in zip(floors, theirs, strict=True)])
    return Row(id, metric, "x", floor, "model", note=f"{median(floors):.3g} over {median(theirs):.3g} s")


def streams(scope: Scope) -> Part:
    """Poisson (c), (d), and a load that the device serves with ease."""
    seconds = {RTX4090: 20 if scope.quick else 60, H200: 40}
    rates = {RTX4090: (("c", 2.0), ("d", 4.0), ("idle", 0.3)), H200: (("c", 5.0), ("d", 10.0), ("idle", 1.0))}
    if scope.quick:
        del rates[H200]
    base = {RTX4090: BURSTS[0], H200: BURSTS[2]}
    contests = {
        (setup := stream(base[device], name, rate, seconds[device] * (3 if name == "idle" else 1))).id: Contest(
            setup.load, device, tuple(scope.seeds), (BASELINE, GREEDY, PACED, OURS)
        )
        for device, pairs in rates.items()
        for name, rate in pairs
    }

    paced = {id: _always_paused(contest) for id, contest in contests.items() if not id.endswith("idle")}

    def rows(results: Results) -> list[Row]:
        made = []
        for id, contest in contests.items():
            if id.endswith("idle"):
                for figure in ("effective", "ttft_p99", "raw"):
                    bar = "0.98 to 1.02" if figure == "effective" else ""
                    made.append(contest.over(results, figure, GREEDY, id=f"e3.{id}.{figure}", bar=bar))
                continue
            for figure, published, bar in _STREAM:
                made.append(contest.over(results, figure, id=f"e3.{id}.{figure}", published=published, bar=bar))
            made += [contest.over(results, claim.figure, GREEDY, id=f"e3.{id}.{claim.figure}") for claim in _STREAM]
            made += _beside_pacing(results, contest, paced[id], f"e3.{id}")
        return made

    title = "Poisson (c) and (d), and parity when under-loaded"
    return Part("e3", title, all_cells((*contests.values(), *paced.values())), rows)


def traces(scope: Scope) -> Part:
    """A day and night of BurstGPT's shape in twenty minutes."""
    minutes = 2 if scope.quick else 20
    devices: tuple[Device, ...] = (RTX4090,) if scope.quick else (RTX4090, H200_32B)
    policies = (BASELINE, GREEDY, PACED, OURS)
    contests = {}
    for device in devices:
        for load, rate in _TRACE_RATES[device].items():
            if scope.quick and load != "busy":
                continue
            setup = trace(device, rate, minutes)
            name = ".".join(filter(None, ("e4", device.name, load)))
            contests[name] = Contest(setup.load, device, tuple(scope.seeds), policies, pictured=True)
    paced = {name: _always_paused(contest) for name, contest in contests.items()}

    def rows(results: Results) -> list[Row]:
        made = []
        for name, contest in contests.items():
            note = "paper: an A6000" if contest.device is RTX4090 else ""
            for figure, known, bar in _TRACE:
                published = _TRACE_EFFECTIVE[contest.device] if figure == "effective" else known
                id = f"{name}.{figure}"
                made.append(contest.over(results, figure, id=id, published=published, bar=bar, note=note))
                made.append(contest.over(results, figure, GREEDY, id=id))
            made += _beside_pacing(results, contest, paced[name], name)
        return made

    def draw(results: Results, folder: Path) -> None:
        for name, contest in contests.items():
            picture = folder / f"trace-{name[3:]}.png"
            pictures.draw_burst(contest.pictured_runs(results), picture, f"Trace on {name[3:]}, simulated")

    title = f"A BurstGPT-like trace of {minutes} minutes"
    return Part("e4", title, all_cells((*contests.values(), *paced.values())), rows, draw)
