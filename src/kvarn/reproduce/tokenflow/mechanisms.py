"""E0, E8 and E9: the paper's example to the letter, what each mechanism is worth, and what deciding costs."""

from __future__ import annotations

from dataclasses import replace
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
    "no overlap": (Switches(one_way=True), 74.43 / 66.0),
    "no write-through": (Switches(copies=CopyRules(write_ahead="off")), 82.76 / 66.0),
    "no offload": (Switches(("offload=off",)), 127.28 / 66.0),
}
"""What is left out -> how, and the paper's time over that of the full method (its Table 2)."""
_SLOW_LINK = 0.2
"""Of the bandwidth: what copies in pieces of 2 KiB reach, as in a pool that is laid out by layer and token."""
_FURTHER: dict[str, Switches] = {
    "nothing beside the compute": Switches(copies=CopyRules(overlap=False)),
    "write in order": Switches(copies=CopyRules(write_ahead="in order")),
    "no local search": Switches(("local_search=off",)),
    "no hysteresis": Switches(("hysteresis=off",)),
    "no pause": Switches(("pause=off",)),
    "eager pause": Switches(("pause=eager",)),
    "published gain": Switches(("gain=published",)),
}
_ABLATION_FIGURES = ("makespan", "ttft_p99", "ttft_mean", "e2el_mean", "effective", "preemptions")
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
    """Burst (b) on the RTX 4090 without one thing at a time, on its link and on one that copies in small pieces."""
    setup = BURSTS[1]
    links = {"": setup.device, "slow-link.": replace(setup.device, name="rtx4090-slow-link", link=_SLOW_LINK)}
    paper = {name: how for name, (how, _) in _ABLATED.items()}
    switches = {"": paper} if scope.quick else {"": paper | _FURTHER, "slow-link.": paper}
    contests = {
        (link, name): Contest(setup.load, links[link], tuple(scope.seeds), (OURS,), how)
        for link in switches
        for name, how in ({"full": Switches()} | switches[link]).items()
    }

    def share(results: Results, link: str, name: str, figure: str) -> Estimate:
        return ratio(contests[link, name].values(results, figure), contests[link, "full"].values(results, figure))

    def row(results: Results, link: str, name: str, figure: str) -> Row:
        text, unit = FIGURES[figure]
        ours, base = (median(contests[link, one].values(results, figure)) for one in (name, "full"))
        known = _ABLATED[name][1] if figure == "makespan" and name in _ABLATED else None
        note = f"{ours:.4g} over {base:.4g} {unit}" + ("; the paper's table names no figure" if known else "")
        id = f"e8.{link}{name.replace(' ', '-')}.{figure}"
        estimate = share(results, link, name, figure)
        return Row(id, f"{text}, {name} over full", "x", estimate, "simulated", known, note=note)

    def rows(results: Results) -> list[Row]:
        made = []
        for link, names in switches.items():
            for name in names:
                made += [row(results, link, name, figure) for figure in _ABLATION_FIGURES]
                id = f"e8.{link}{name.replace(' ', '-')}.stall_mean"
                made.append(contests[link, name].row(results, "stall_mean", id=id))
            times = [1.0, *(share(results, link, name, "makespan").value for name in _ABLATED)]
            kept = Estimate(float(all(a < b for a, b in pairwise(times))))
            order = "full < no overlap < no write-through < no offload, in makespan"
            made.append(Row(f"e8.{link}order", order, "1: yes", kept, "simulated", 1, "= 1"))
        return made

    def draw(results: Results, folder: Path) -> None:
        times = {name: share(results, "", name, "makespan") for name in switches[""]}
        pictures.draw_ablation(
            {"full": Estimate(1.0, 1.0, 1.0), **times}, folder / "ablation.png", "Makespan of burst (b), RTX 4090"
        )

    title = "Burst (b) on the RTX 4090 without one thing at a time"
    return Part("e8", title, all_cells(contests.values()), rows, draw)


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
