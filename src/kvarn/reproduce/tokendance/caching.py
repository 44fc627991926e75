"""The cell behind X1, X2 and X6: a few rounds of the real model, and what the caches of the last one have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kvarn.reproduce.tokendance.caches import Taken, likeness, take_member
from kvarn.reproduce.tokendance.players import Arm, load, play_society, scenario_texts
from kvarn.serving.kvcache.mirrors import MirrorStore
from kvarn.serving.request import Request
from kvarn.simulation.rounds.progress import Ask
from kvarn.simulation.rounds.scenarios import Span
from kvarn.simulation.rounds.texts import SeededTexts
from kvarn.simulation.rounds.workload import RoundWorkload, draw_societies

BLOCKS = (1, 8, 16, 32)
"""Tokens in a block of the store."""
PRIVATE = (0.0, 0.04, 0.2)
"""Of what a mirror stands for, the member's own."""
_ANSWERS = Span(64, 96)
_UNLIMITED = 2**50
_WORDS = (100, 30_000)
"""Token ids that seeded text is made of."""


@dataclass(frozen=True)
class Caches:
    """The cell: one society, one way of reuse."""

    arm: Arm
    agents: int = 8
    text: Literal["scenario", "seeded"] = "scenario"
    rounds: int = 3
    history: int = 192
    output: Span = _ANSWERS
    visibility: float = 1.0
    private: tuple[float, ...] = PRIVATE
    seed: int = 0
    scenario: str = "valentines-party"

    alone = False

    @property
    def cost(self) -> float:
        return 0.01 * self.agents * (self.history + self.rounds * self.agents * self.output.high)

    def run(self) -> dict[str, Any]:
        prompt = self.history + self.agents * (self.output.high + 8) + 200
        loaded = load(self.arm, tokens=2 * self.agents * prompt, threads=1)
        engine, taken, held = loaded.engine, dict[str, Taken](), list[_Held]()

        def look(ask: Ask, request: Request) -> None:
            if ask.round == self.rounds - 1:
                taken[ask.hint.agent] = take_member(engine, ask, request)
                held.append(_held(request, self.arm.block_size))

        [spec] = draw_societies(self._workload())
        if self.text == "scenario":
            play_society(engine, spec, scenario_texts(loaded, self.seed), on_member=look)
        else:
            texts = SeededTexts(*_WORDS, self.seed)
            play_society(engine, spec, texts, invented=texts, on_member=look)
        engine.close()
        alike = {size: likeness(list(taken.values()), size) for size in BLOCKS}
        return {
            "first_layer": {f"{size}": float(each[0]) for size, each in alike.items()},
            "others": {f"{size}": float(each[1:].mean()) for size, each in alike.items()},
            "all": {f"{size}": float(each.mean()) for size, each in alike.items()},
            "stored": self._stored(taken),
            "refreshed": sum(each.refreshed for each in held) / max(1, sum(each.shared for each in held)),
            "segment_tokens": float(np.mean([len(rows) for each in taken.values() for rows in each.segments.values()])),
            "memory": _memory(held, self.arm.block_size),
        }

    def _workload(self) -> RoundWorkload:
        history = Span(self.history, self.history)
        return RoundWorkload(
            self.scenario, self.agents, self.rounds, history, self.output, visibility=self.visibility, seed=self.seed
        )

    def _stored(self, taken: dict[str, Taken]) -> dict[str, Any]:
        """How much smaller mirrors are, and the family, by the size of a block and the share that is private."""
        found = {}
        for size in BLOCKS:
            for private in self.private if size >= 16 else (0.0,):
                members = {name: each.member(name, size, private) for name, each in taken.items()}
                report = MirrorStore(_UNLIMITED).store("round", members)
                assert report is not None
                dense = sum(each.blocks.nbytes for each in members.values())
                ratios = list(report.ratios.values())
                own = [sum(id.startswith("of ") for id, _ in each.keys) / len(each.keys) for each in members.values()]
                found[f"{size}/{private:g}"] = {
                    "mean": float(np.mean(ratios)), "least": min(ratios), "most": max(ratios),
                    "group": dense / sum(report.stored_bytes.values()), "private": float(np.mean(own)),
                }  # fmt: skip
        return found


@dataclass(frozen=True)
class _Held:
    """Of one request, in tokens but for blocks."""

    blocks: int
    shared: int
    refreshed: int
    views: dict[bytes, int]
    """Segments that are read in place -> their blocks."""
    copied: int
    """Blocks of its own that hold shared text."""


def _held(request: Request, block_size: int) -> _Held:
    layout = request.layout
    if layout is None:
        return _Held(request.num_blocks, 0, 0, {}, 0)
    shared = sum(each.segment.length for each in layout.placed)
    if layout.views:
        views = {view.segment.key: len(view.segment.blocks) for view in layout.views}
        return _Held(request.num_blocks, shared, layout.refreshed, views, -(-layout.refreshed // block_size))
    copied = sum(each.segment.num_blocks(block_size) for each in layout.placed)
    return _Held(request.num_blocks, shared, layout.refreshed, {}, copied)


def _memory(held: list[_Held], block_size: int) -> dict[str, int]:
    """Blocks of the pool that the round holds: all, and those of shared text."""
    views = {key: blocks for each in held for key, blocks in each.views.items()}
    in_place = sum(views.values())
    return {
        "blocks": sum(each.blocks for each in held) + in_place,
        "shared_blocks": sum(each.copied for each in held) + in_place,
    }
