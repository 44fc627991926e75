"""X5: how many agents a device serves within a limit on the latency of rounds, against prefix caching."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from kvarn.reproduce.contract import Row, Scope
from kvarn.reproduce.experiment import Part, Results
from kvarn.reproduce.statistics import Estimate, level, ratio
from kvarn.reproduce.tokendance import pictures, prefill
from kvarn.reproduce.tokendance.setups import BATCHED, COLLECTIVE, COPIES, EXACT, SERIAL, SLO_SECONDS, seeds
from kvarn.reproduce.tokendance.simulated import Capacity, Crowd
from kvarn.simulation.rounds.scenarios import Span

_ARMS = {"prefix": EXACT, "serial": SERIAL, "batched": BATCHED, "copies": COPIES, "collective": COLLECTIVE}
_WORDS = {
    "serial": "reuse, one request at a time",
    "batched": "reuse, batched, each with a choice of its own",
    "copies": "collective, each with a copy of shared text",
    "collective": "collective, shared text read in place",
}
_SCENARIOS = {"generative": "information-outbreak", "society": "storm-warning"}
_MODELS = {"7b": "qwen2-7b", "14b": "qwen2.5-14b"}
_SECONDS_OF_LOAD = 24
"""Rounds a second for so long, in societies of eight rounds each."""


@dataclass(frozen=True)
class _Panel:
    """One model, kind of society and rate."""

    size: str
    kind: str
    qps: float
    short: bool = False
    """Whether answers are of 32 tokens: longer ones take a large model most of the time there is."""

    @property
    def id(self) -> str:
        return f"{self.size}.{self.kind}.qps-{self.qps:g}" + (".short" if self.short else "")

    def cells(self, scope: Scope, name: str, percentile: float = 95.0) -> tuple[Capacity, ...]:
        output = Span(32, 32) if self.short else Span(32, 64)
        crowd = Crowd(_SCENARIOS[self.kind], self.qps, *_load(scope, self.qps), output=output)
        most = 16 if scope.quick else 48
        return tuple(
            Capacity(crowd, _MODELS[self.size], _ARMS[name], SLO_SECONDS, percentile, most=most, seed=seed)
            for seed in seeds(scope)
        )


def _panels(scope: Scope) -> list[_Panel]:
    if scope.quick:
        return [_Panel("7b", "generative", 2.0)]
    if scope.level == "default":
        return [
            _Panel("7b", "generative", 1.0), _Panel("7b", "society", 1.0), _Panel("14b", "generative", 0.5, short=True),
            _Panel("14b", "generative", 8.0),
        ]  # fmt: skip
    rates = (1.0, 2.0, 4.0, 8.0)
    return [_Panel(size, kind, qps) for size in _MODELS for kind in _SCENARIOS for qps in rates]


def _load(scope: Scope, qps: float) -> tuple[int, int]:
    """Rounds of a society, and societies."""
    if scope.level == "full":
        return 8, max(3, round(_SECONDS_OF_LOAD * qps / 8))
    return (3, 4) if scope.quick else (5, 3)


def agents(scope: Scope) -> Part:
    """X5."""
    panels = _panels(scope)
    with_medians = [] if scope.level == "default" else panels
    medians = {
        (panel, name): panel.cells(scope, name, 50.0) for panel in with_medians for name in ("prefix", "collective")
    }
    cells = {(panel, name): panel.cells(scope, name) for panel in panels for name in _ARMS}
    real = prefill.real_agents(scope)

    def rows(results: Results) -> list[Row]:
        def found(group: tuple[Capacity, ...]) -> list[float]:
            return [float(results[cell]["agents"]) for cell in group]

        made: list[Row] = []
        gains: dict[str, Estimate] = {}
        for panel in panels:
            base = found(cells[panel, "prefix"])
            made.append(
                Row(f"x5.{panel.id}.prefix", "most agents, prefix caching, P95", "agents", level(base), "simulated")
            )
            for name, words in _WORDS.items():
                ours = found(cells[panel, name])
                gain = ratio(ours, base) if all(base) else Estimate(float("nan"))
                note = f"{level(ours).value:g} agents"
                if name == "collective":
                    gains[panel.id] = gain
                published = 4.0 if (panel.id, name) == ("14b.generative.qps-8", "collective") else None
                text = f"agents over prefix caching's, {words}"
                made.append(Row(f"x5.{panel.id}.{name}", text, "x", gain, "simulated", published, "", note))
            if panel in with_medians:
                middle = [found(medians[panel, name]) for name in ("collective", "prefix")]
                gain = ratio(*middle) if all(middle[1]) else Estimate(float("nan"))
                note = f"{level(middle[0]).value:g} agents over {level(middle[1]).value:g}"
                text = "agents over prefix caching's, collective, P50"
                made.append(Row(f"x5.{panel.id}.collective.p50", text, "x", gain, "simulated", None, "", note))
            made += _latencies(panel, cells[panel, "prefix"], cells[panel, "collective"], results)
        whole = {id: gain for id, gain in gains.items() if gain.value == gain.value}
        best = max(whole, key=lambda id: whole[id].value)
        text = "agents over prefix caching's, collective, P95, best panel"
        note = f"it is {best}; the paper says up to 2.7, and in a figure 4 against 1"
        made.append(Row("x5.best", text, "x", whole[best], "simulated", 2.7, "" if scope.quick else ">= 2.7", note))
        mean = Estimate(fmean(gain.value for gain in whole.values()))
        text = f"agents over prefix caching's, collective, P95, mean of {len(whole)} panels"
        made.append(Row("x5.mean", text, "x", mean, "simulated"))
        return made + prefill.real_rows(real, results)

    def draw(results: Results, folder: Path) -> None:
        rates = list(dict.fromkeys(panel.qps for panel in panels))
        if len(panels) % len(rates) or any(panel.short for panel in panels):
            return  # no curves over the rates
        curves = {
            f"{size}, {kind}": {
                name: [level([results[cell]["agents"] for cell in cells[panel, name]]).value
                       for panel in panels if (panel.size, panel.kind) == (size, kind)]
                for name in _ARMS
            }
            for size, kind in dict.fromkeys((panel.size, panel.kind) for panel in panels)
        }  # fmt: skip
        pictures.draw_agents(rates, curves, folder / "agents.png")

    every = (
        *(cell for group in cells.values() for cell in group),
        *(cell for group in medians.values() for cell in group),
    )
    return Part("x5", "Agents within 1.5 s a round", (*every, *real), rows, draw)


def _latencies(panel: _Panel, base: tuple[Capacity, ...], ours: tuple[Capacity, ...], results: Results) -> list[Row]:
    """Round latency of prefix caching over ours, with as many agents as both tried: within its limit, and beyond."""
    limit = min(int(results[cell]["agents"]) for cell in base)
    tried = set.intersection(*(set(map(int, results[cell]["trials"])) for cell in (*base, *ours)))
    rows = []
    for name, counts in (("within", [n for n in tried if n <= limit]), ("beyond", [n for n in tried if n > limit])):
        if not counts:
            continue
        count = max(counts) if name == "within" else min(counts)
        seconds = [[results[cell]["trials"][f"{count}"]["p95"] for cell in group] for group in (base, ours)]
        text = f"P95 of a round, prefix caching over collective, {count} agents"
        note = f"{'within' if name == 'within' else 'just beyond'} the limit of prefix caching, {limit} agents"
        published = 2.3 if name == "within" else None
        rows.append(Row(f"x5.{panel.id}.latency.{name}", text, "x", ratio(*seconds), "simulated", published, "", note))
    return rows
