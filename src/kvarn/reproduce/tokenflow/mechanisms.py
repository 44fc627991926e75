"""E0, E8 and E9: the paper's example to the letter, what each mechanism is worth, and what deciding costs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import median

from kvarn.reproduce.contract import Row, Scope
from kvarn.reproduce.experiment import Part, Results
from kvarn.reproduce.statistics import Estimate, level, ratio
from kvarn.reproduce.tokenflow import pictures
from kvarn.reproduce.tokenflow.cells import Switches
from kvarn.reproduce.tokenflow.contest import FIGURES, OURS, Contest, all_cells
from kvarn.reproduce.tokenflow.policy_cost import PolicyCost, TrackerCost
from kvarn.reproduce.tokenflow.setups import BURSTS
from kvarn.reproduce.tokenflow.toy import Toy
from kvarn.serving.kvcache.copies import CopyRules

_ABLATED: dict[str, tuple[Switches, float | None]] = {
    "no overlap": (Switches(copies=CopyRules(overlap=False)), 74.43 / 66.0),
    "no write-through": (Switches(copies=CopyRules(write_ahead="off")), 82.76 / 66.0),
    "no offload": (Switches(("offload=off",)), 127.28 / 66.0),
}
"""What is left out -> how, and the paper's time over that of the full method (its Table 2)."""
_FURTHER: dict[str, Switches] = {
    "write in order": Switches(copies=CopyRules(write_ahead="in order")),
    "no local search": Switches(("local_search=off",)),
    "no hysteresis": Switches(("hysteresis=off",)),
    "no pause": Switches(("pause=off",)),
    "eager pause": Switches(("pause=eager",)),
    "published gain": Switches(("gain=published",)),
}
_COSTS = {400: "<= 0.4", 10_000: "<= 5"}
"""Requests -> milliseconds that a decision may take."""


def example(scope: Scope) -> Part:
    """Two places, three readers."""
    toy = Toy()

    def rows(results: Results) -> list[Row]:
        played = results[toy]
        moves = [*played["preemptions"], [float("nan"), "nobody"], [float("nan"), "nobody"]][:2]
        back = next((at for at in played["starts"].get("R1", ()) if at > 0), float("nan"))
        return [
            Row("e0.first", "first to give way (R1)", "s", Estimate(moves[0][0]), "simulated", 3, "= 3",
                f"it is {moves[0][1]}"),
            Row("e0.second", "second to give way (R2)", "s", Estimate(moves[1][0]), "simulated", 5, "= 5",
                f"it is {moves[1][1]}"),
            Row("e0.resumed", "R1 resumes", "s", Estimate(back), "simulated", 5, "= 5"),
            Row("e0.stalls", "stalls in 14 s", "count", Estimate(played["stalls"]), "simulated", 0, "= 0"),
        ]  # fmt: skip

    return Part("e0", "The paper's example of two places and three readers", (toy,), rows)


def ablation(scope: Scope) -> Part:
    """Burst (b) on the RTX 4090 without one thing at a time."""
    setup = BURSTS[1]
    switches = {name: how for name, (how, _) in _ABLATED.items()} | ({} if scope.quick else _FURTHER)
    full = Contest(setup.load, setup.device, tuple(scope.seeds), (OURS,), pictured=True)
    without = {
        name: Contest(setup.load, setup.device, tuple(scope.seeds), (OURS,), how) for name, how in switches.items()
    }

    def share(results: Results, name: str, figure: str) -> Estimate:
        return ratio(without[name].values(results, figure), full.values(results, figure))

    def rows(results: Results) -> list[Row]:
        made = []
        for name in without:
            published = _ABLATED[name][1] if name in _ABLATED else None
            for figure in ("makespan", "ttft_p99", "ttft_mean", "e2el_mean", "effective", "preemptions"):
                text, unit, _ = FIGURES[figure]
                ours, base = (median(one.values(results, figure)) for one in (without[name], full))
                known = published if figure == "makespan" else None
                note = f"{ours:.4g} over {base:.4g} {unit}"
                if known is not None:
                    note += "; the paper's table names no figure"
                id = f"e8.{name.replace(' ', '-')}.{figure}"
                metric = f"{text}, {name} over full"
                made.append(Row(id, metric, "x", share(results, name, figure), "simulated", known, note=note))
            made.append(without[name].row(results, "stall_mean", id=f"e8.{name.replace(' ', '-')}.stall_mean"))
        times = [1.0, *(share(results, name, "makespan").value for name in _ABLATED)]
        kept = Estimate(float(all(a < b for a, b in pairwise(times))))
        order = "full < no overlap < no write-through < no offload, in makespan"
        made.append(Row("e8.order", order, "1: yes", kept, "simulated", 1, "= 1"))
        return made

    def draw(results: Results, folder: Path) -> None:
        times = {name: share(results, name, "makespan") for name in without}
        pictures.draw_ablation(
            {"full": Estimate(1.0, 1.0, 1.0), **times}, folder / "ablation.png", "Makespan of burst (b), RTX 4090"
        )

    title = "Burst (b) on the RTX 4090 without one thing at a time"
    return Part("e8", title, all_cells((full, *without.values())), rows, draw)


def overhead(scope: Scope) -> Part:
    """What a decision costs, on this machine."""
    seconds, repeats = (0.8, 2) if scope.quick else (6.0, 5)
    decisions = {
        count: [PolicyCost(count, seconds * (1 + count / 5000), i) for i in range(repeats)] for count in _COSTS
    }
    trackers = [TrackerCost(i) for i in range(repeats)]

    def rows(results: Results) -> list[Row]:
        made = []
        for count, cells in decisions.items():
            for kind, bar in (("all", _COSTS[count]), ("look", ""), ("step", "")):
                name = {"all": "a decision, on average", "look": "a decision with a new plan", "step": "any other"}[
                    kind
                ]
                cost = level([results[cell][kind] for cell in cells])
                published = 0.4 if count == 400 and kind == "all" else None
                id, metric = f"e9.{count}.{kind}", f"{name}, {count:,} requests"
                made.append(Row(id, metric, "ms", cost, "real", published, bar))
        tracker = level([results[cell]["token"] for cell in trackers])
        made.append(Row("e9.tracker", "a reader's clock, for each token", "us", tracker, "real", None, "< 50"))
        return made

    return Part("e9", "What deciding costs", (*(c for cells in decisions.values() for c in cells), *trackers), rows)
