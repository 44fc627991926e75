"""X1, X2 and X6: what caches of a round have in common, and how small that makes each of them and all together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvarn.reproduce.contract import Row, Scope
from kvarn.reproduce.experiment import Part, Results
from kvarn.reproduce.statistics import Estimate, level
from kvarn.reproduce.tokendance import pictures
from kvarn.reproduce.tokendance.caching import BLOCKS, Caches
from kvarn.reproduce.tokendance.players import LAYERS, Arm
from kvarn.reproduce.tokendance.setups import BATCHED, COLLECTIVE, COPIES, EXACT, LEGO, SHARE, USUAL_SHARE, seeds
from kvarn.serving.kvcache.mirror_family import predicted_ratio, touched_share
from kvarn.simulation.rounds.scenarios import Span

_FEASIBLE = 0.09
"""Private and recomputed shares that leave a mirror 11 times smaller."""
_SHARES = (0.02, 0.05, 0.09, 0.15, 0.3)
_LAYERS = {"first_layer": "the first layer", "others": "other layers"}
_PAIRS, _PUBLISHED = 55, {28: (22, 11.2), 48: (20, 17.5)}
"""Of the paper's mirrors: differing pairs of a layer and a block; layers -> blocks of a cache, times smaller."""


@dataclass(frozen=True)
class _Case:
    """One way of reuse, under each seed."""

    name: str
    cells: tuple[Caches, ...]

    @property
    def arm(self) -> Arm:
        return self.cells[0].arm

    def values(self, results: Results, *path: str) -> list[float]:
        found: list[Any] = [results[cell] for cell in self.cells]
        for key in path:
            found = [each[key] for each in found]
        return found

    def level(self, results: Results, *path: str) -> Estimate:
        return level(self.values(results, *path))


def redundancy(scope: Scope) -> Part:
    """X1."""
    texts = ("seeded",) if scope.quick else ("scenario", "seeded")
    cases = {
        (text, name): _case(scope, f"{text}.{name}", arm, text=text)
        for text in texts
        for name, arm in (("collective", COLLECTIVE), ("batched", BATCHED), ("lego", LEGO), ("exact", EXACT))
    }

    def rows(results: Results) -> list[Row]:
        made = []
        for (text, name), case in cases.items():
            if name == "exact":
                for layers, bar in (("first_layer", ""), ("others", "<= 0.02")):
                    what = f"equal blocks of 16, exact prefill, {_LAYERS[layers]}"
                    estimate = case.level(results, layers, "16")
                    made.append(Row(f"x1.{text}.exact.{layers}", what, "x", estimate, "real", None, bar))
                continue
            collective = name == "collective"
            made.append(
                Row(f"x1.{text}.{name}", f"equal blocks of 16 of two agents' shared text, {name}", "x",
                    case.level(results, "all", "16"), "real", 0.94 if collective else None,
                    ">= 0.91" if collective else "",
                    "published: 0.91 to 0.97" if collective else f"{_refreshed(case, results):.1%} computed anew")
            )  # fmt: skip
        return made

    return Part("x1", "What the caches of agents in a round have in common", _cells(cases.values()), rows)


def compression(scope: Scope) -> Part:
    """X2."""
    cases = _regimes(scope)

    def rows(results: Results) -> list[Row]:
        made = [row for case in cases for row in _measured(case, results)]
        feasible = [row for row in made if row.bar]
        best = max(feasible, key=lambda row: row.measured.value)
        text = "times smaller, the best mirror at h + r <= 9 %"
        made.append(Row("x2.best", text, "x", best.measured, "real", 17.5, ">= 17.5", f"it is {best.id}"))
        for layers, (blocks, published) in _PUBLISHED.items():
            model = Estimate(layers * blocks / _PAIRS)
            text = f"times smaller, {layers} layers, {_PAIRS} differing pairs of a layer and a block"
            note = f"explains the paper's, with {blocks} blocks of 32"
            made.append(Row(f"x2.paper.layers-{layers}", text, "x", model, "model", published, "", note))
        for layers in (24, 28, 48):
            model = Estimate(_predicted(0.0, SHARE, layers))
            text = f"times smaller, {layers} layers, {SHARE:.0%} of blocks computed anew"
            made.append(Row(f"x2.formula.layers-{layers}", text, "x", model, "model"))
        return made

    def draw(results: Results, folder: Path) -> None:
        points: dict[str, list[tuple[float, float]]] = {"collective": [], "lego": [], "batched": []}
        for case in cases:
            if case.arm.block_size == 16:
                times = case.level(results, "stored", "16/0", "mean").value
                points[case.arm.mode].append((_share(case, results), times))
        pictures.draw_ratios(points, folder / "compression.png")

    return Part("x2", "How much smaller a mirror is", _cells(cases), rows, draw)


def memory(scope: Scope) -> Part:
    """X6."""
    agents = (4,) if scope.quick else (4, 10) if scope.level == "default" else (4, 8, 10, 16)
    spans = {"output": Span(96, 128), "text": "seeded", "private": (0.0,)}
    cases = {
        (count, name): _case(scope, f"n-{count}.{name}", arm, agents=count, **spans)
        for count in agents
        for name, arm in (("collective", COLLECTIVE), ("copies", COPIES))
    }

    def rows(results: Results) -> list[Row]:
        made = []
        for count in agents:
            shared, dense = cases[count, "collective"], cases[count, "copies"]
            bar = ">= 5.5" if count == 10 else ""
            ratio = shared.level(results, "stored", "16/0", "mean").value
            formula = Estimate(count / (1 + (count - 1) / ratio))
            made += [
                Row(f"x6.n-{count}.stored", f"times smaller, {count} agents' shared text as master and mirrors", "x",
                    shared.level(results, "stored", "16/0", "group"), "real", None, bar, "in host memory"),
                Row(f"x6.n-{count}.formula", f"times smaller, N / (1 + (N - 1) / R) at R = {ratio:.1f}", "x", formula,
                    "model", None, "", "published R of 11 to 17.5: 5.5 to 6.6 at N = 10" if count == 10 else ""),
                _blocks(f"x6.n-{count}.in-use", "fewer blocks of the pool for shared text", bar, results, dense, shared,
                        "shared_blocks"),
                _blocks(f"x6.n-{count}.in-use.all", "fewer blocks of the pool, with histories, tasks and answers", "",
                        results, dense, shared, "blocks"),
            ]  # fmt: skip
        return made

    return Part("x6", "Memory of a round", _cells(cases.values()), rows)


def _regimes(scope: Scope) -> list[_Case]:
    """By share, selection and block."""
    arms = {
        "quick": [COLLECTIVE, replace(COLLECTIVE, share=0.02), replace(BATCHED, share=USUAL_SHARE), LEGO],
        "default": [
            *(replace(COLLECTIVE, share=share) for share in _SHARES),
            *(replace(COLLECTIVE, block_size=size) for size in (8, 32)),
            *(replace(BATCHED, share=share) for share in (0.005, SHARE, USUAL_SHARE)),
            *(replace(LEGO, block_size=size) for size in (8, 16, 32)),
        ],
    }["quick" if scope.quick else "default"]
    return [_case(scope, _name(arm), arm, text="seeded") for arm in arms]


def _name(arm: Arm) -> str:
    kind = {"collective": "block", "batched": "topk", "lego": "lego"}[arm.mode]
    share = "" if arm.mode == "lego" else f".r-{100 * arm.share:g}"
    return f"{kind}{share}" + (f".engine-{arm.block_size}" if arm.block_size != 16 else "")


def _case(scope: Scope, name: str, arm: Arm, **conditions: Any) -> _Case:
    if scope.quick:
        conditions = {"agents": 4, "rounds": 2, "output": Span(96, 128)} | conditions
    return _Case(name, tuple(Caches(arm, seed=seed, **conditions) for seed in seeds(scope)))


def _cells(cases: Any) -> tuple[Caches, ...]:
    return tuple(cell for case in cases for cell in case.cells)


def _refreshed(case: _Case, results: Results) -> float:
    return case.level(results, "refreshed").value


def _touched(case: _Case, results: Results) -> float:
    """Of the engine's blocks, those that two members do not have in common; without the first layer."""
    return 1.0 - case.level(results, "others", f"{case.arm.block_size}").value


def _share(case: _Case, results: Results) -> float:
    """Computed anew: of tokens where they are chosen one by one, else of blocks."""
    return case.arm.share if case.arm.mode == "batched" else _touched(case, results)


def _measured(case: _Case, results: Results) -> list[Row]:
    """A row for each size of the store's blocks and each private share."""
    rows, arm = [], case.arm
    for size in BLOCKS:
        for private in case.cells[0].private if size >= 16 else (0.0,):
            share = _share(case, results)
            if arm.mode == "batched":  # either of the two may have a token of the block computed anew
                touched = touched_share(share, 2 * size)
            else:
                touched = touched_share(share, max(1, size // arm.block_size))
            found = case.level(results, "stored", f"{size}/{private:g}", "mean")
            own = case.level(results, "stored", f"{size}/{private:g}", "private").value
            predicted = _predicted(own, touched, LAYERS)
            # Only where the store's blocks are the engine's can both shares be what the regime is about.
            asked = arm.mode == "collective" and size == arm.block_size and own + share <= _FEASIBLE
            rows.append(
                Row(f"x2.{case.name}.block-{size}.h-{100 * private:g}",
                    f"times smaller, blocks of {size}, {own:.1%} private, {share:.1%} "
                    f"{'of tokens' if arm.mode == 'batched' else 'of blocks'} computed anew",
                    "x", found, "real", None, ">= 11" if asked else "", f"predicted {predicted:.1f}")
            )  # fmt: skip
    return rows


def _predicted(private: float, touched: float, layers: int) -> float:
    """The note's formula; the first layer is the same for everybody."""
    return predicted_ratio(private, touched * (layers - 1) / layers)


def _blocks(id: str, what: str, bar: str, results: Results, dense: _Case, shared: _Case, figure: str) -> Row:
    pairs: Sequence[tuple[float, float]] = list(
        zip(dense.values(results, "memory", figure), shared.values(results, "memory", figure), strict=True)
    )
    return Row(id, what, "x", level([a / b for a, b in pairs]), "real", None, bar)
