"""E7, E8 and E12 to E14: what copies and decisions cost, a fixture that must not stand still, and equal tokens."""

from __future__ import annotations

from itertools import chain

import numpy as np

from kvarn.reproduce.contract import Row, Scope
from kvarn.reproduce.experiment import Cell, Part, Results
from kvarn.reproduce.statistics import Estimate, level
from kvarn.reproduce.tokencake.copying import CONVERSATION_TOKENS, ReturnDelay, SlotCost, Transfer
from kvarn.reproduce.tokencake.deadlock import Deadlock
from kvarn.reproduce.tokencake.policy_cost import PolicyCost
from kvarn.reproduce.tokencake.real_model import RealModel
from kvarn.reproduce.tokencake.setups import A100

_READ = {
    1024: (6, 6, 2211), 2048: (16, 16, 4462), 3072: (19, 18, 6708), 4096: (32, 29, 8943), 5120: (37, 29, 11199),
}  # fmt: skip
"""Blocks -> the paper's milliseconds to offload, upload and compute them again."""
_IMPOSSIBLE = "the paper's is some 400 GB/s, which no such link has"
_BLOCK_BYTES = 3 * 2**20
"""Of 16 tokens with 14 B parameters."""
_CONVERSATIONS = (1024, 5120)


def transfers(scope: Scope) -> Part:
    """E7."""
    cells = {blocks: Transfer(A100.hardware, A100.model, blocks) for blocks in _READ}

    def rows(results: Results) -> list[Row]:
        made = []
        for blocks, cell in cells.items():
            found, known = results[cell], dict(zip(("offload", "upload", "recompute"), _READ[blocks], strict=True))
            there_and_back = found["offload"] + found["upload"]
            for name, published in known.items():
                note = f"in conversations of {CONVERSATION_TOKENS:,} tokens" if name == "recompute" else _IMPOSSIBLE
                text = {"recompute": "to compute again"}.get(name, f"to {name}") + f" {blocks:,} blocks"
                made.append(
                    Row(f"e7.{blocks}.{name}", text, "ms", Estimate(1e3 * found[name]), "model", published, "", note)
                )
            made.append(
                Row(f"e7.{blocks}.link", f"{blocks:,} blocks there and back, over bytes by bandwidth", "x",
                    Estimate(there_and_back / found["ideal"]), "simulated", None, "0.8 to 1.2")
            )  # fmt: skip
            made.append(
                Row(f"e7.{blocks}.gain", f"{blocks:,} blocks computed again, over there and back", "x",
                    Estimate(found["recompute"] / there_and_back), "model", known["recompute"]
                    / (known["offload"] + known["upload"]), ">= 5")
            )  # fmt: skip
        return made

    return Part("e7", "Moving KV against computing it again", tuple(cells.values()), rows)


def places(scope: Scope) -> Part:
    """E8."""
    repeats = range(1 if scope.quick else 3)
    slots = {n: [SlotCost(n, 20 if scope.quick else 100, _BLOCK_BYTES, i) for i in repeats] for n in _CONVERSATIONS}
    late = {gradual: [ReturnDelay(gradual, 300, seed) for seed in scope.seeds] for gradual in (True, False)}

    def rows(results: Results) -> list[Row]:
        made = []
        for blocks, cells in slots.items():
            for figure, text, bar in (
                ("each", "a block's place on the host, P99", "< 1"),
                ("whole", f"places of a conversation of {blocks:,} blocks, P99", ""),
                ("fresh", "a block of 3 MiB from the system instead, P99", ""),
            ):
                cost = level([1e3 * results[cell][figure] for cell in cells])
                made.append(Row(f"e8.{blocks}.{figure}", text, "ms", cost, "real", None, bar))
        for gradual, delays in late.items():
            steps = level([float(np.percentile(results[cell]["late"], 99)) for cell in delays])
            name, words = ("gradual", "step by step") if gradual else ("at-once", "all at once")
            note = "a model of a pool of which 95 % is used, and the engine's rule" + (
                "" if gradual else f"; {delays[0].patience} stands for never: more blocks than the other 5 %"
            )
            text = f"start of an upload too late, blocks reserved {words}, P99"
            made.append(Row(f"e8.{name}", text, "steps", steps, "simulated", None, "< 2" if gradual else "", note))
        return made

    cells: tuple[Cell, ...] = (*chain(*slots.values()), *chain(*late.values()))
    return Part("e8", "Places for what is moved", cells, rows)


def deadlock(scope: Scope) -> Part:
    """E12."""
    cell = Deadlock()

    def rows(results: Results) -> list[Row]:
        found = results[cell]
        note = f"{found['from_host']} tokens came from the host; {found['on_device']} were on the device"
        return [Row("e12.finished", "requests that finish of two that do not fit together", "requests",
                    Estimate(found["finished"]), "simulated", 0, "= 2", note)]  # fmt: skip

    return Part("e12", "Two that come back and do not fit together", (cell,), rows)


def overhead(scope: Scope) -> Part:
    """E13."""
    cells = [PolicyCost(1000, 200, 200, 2.0 if scope.quick else 8.0, i) for i in range(1 if scope.quick else 5)]

    def rows(results: Results) -> list[Row]:
        made = []
        crowd = results[cells[0]]
        note = f"{crowd['waiting']:.0f} wait, {crowd['running']:.0f} run, {crowd['stalled']} are stalled, on average"
        for figure, text, bar in (
            ("mean", "a decision", "< 1"), ("p99", "a decision, P99", ""),
            ("metered", "a decision, inversions counted", ""),
        ):  # fmt: skip
            cost = level([results[cell][figure] for cell in cells])
            made.append(Row(f"e13.{figure}", text, "ms", cost, "real", None, bar, note))
        return made

    return Part("e13", "What deciding costs", tuple(cells), rows)


def real_model(scope: Scope) -> Part:
    """E14."""
    cells = [RealModel(6, 5, i) for i in range(1 if scope.quick else 3)]

    def rows(results: Results) -> list[Row]:
        found = [results[cell] for cell in cells]
        tokens, offloads, uploads = (sum(each[name] for each in found) for name in ("tokens", "offloads", "uploads"))
        note = f"of {tokens:,}; {offloads} conversations were moved to the host, {uploads} brought back ahead of time"
        differing = Estimate(sum(each["differing"] for each in found))
        text = "tokens of a small model that differ when KV is moved"
        return [
            Row("e14.differing", text, "tokens", differing, "real", None, "= 0", note),
            Row("e14.offloads", "conversations moved to the host", "count", Estimate(offloads), "real", None, "> 0"),
        ]

    return Part("e14", "The same tokens, whether KV is moved or not", tuple(cells), rows)
