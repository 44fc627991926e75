"""X7 and X9: what reuse does to a real model's answers, and what is worth computing anew.

Everything is measured by `kvarn.serving.quality`, on the engine as it serves. For comparison alone, tokens are also
chosen by lot, and attention is also masked as CacheBlend's kernel call does it: of n tokens, the j-th of m rows sees
the first n - m + j, which lets it see tokens that come after it.

Source: CacheBlend (arXiv 2405.16444) for the mask; judge consistency after arXiv 2601.08343.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal, cast

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from kvarn.kernels import ops
from kvarn.models.decoder_llama import LlamaDecoder, _Layer
from kvarn.models.spec import ForwardBatch, KVMemory
from kvarn.reproduce.contract import Row, Scope
from kvarn.reproduce.experiment import Part, Results
from kvarn.reproduce.statistics import Estimate
from kvarn.serving.assemble import LoadedEngine, load_engine
from kvarn.serving.executors.torch_executor import TorchExecutor
from kvarn.serving.quality.certify import engine_config, texts
from kvarn.serving.quality.groups import make_groups, make_judges
from kvarn.serving.quality.measure import measure
from kvarn.serving.rounds.hints import ReuseMode
from kvarn.serving.rounds.settings import ReuseSettings
from kvarn.serving.rounds.work import Probe


@dataclass(frozen=True)
class Way:
    """One way of reuse in the experiment."""

    mode: ReuseMode
    share: float
    random: bool = False
    """Choose by lot."""
    bottom_right: bool = False
    """Mask as the published kernel call."""
    source: Literal["isolated", "joint"] = "isolated"

    @property
    def settings(self) -> ReuseSettings:
        return ReuseSettings(self.mode, self.share, source=self.source)

    @property
    def name(self) -> str:
        kind = {"batched": "tokens", "collective": "blocks", "lego": "lego"}.get(self.mode, self.mode)
        marks = [self.source] * (self.source != "isolated") + ["random"] * self.random
        marks += ["bottom-right"] * self.bottom_right + [f"{self.share:g}"] * (self.mode != "lego")
        return ".".join([kind, *marks])


_SHARES = (0.05, 0.15, 0.3, 0.5)
_FLOOR = Way("batched", 1.0)
SELECTIONS = (
    _FLOOR,
    Way("lego", 0.0),
    Way("lego", 0.0, source="joint"),
    *(Way(mode, share) for mode in cast("tuple[ReuseMode, ...]", ("batched", "collective")) for share in _SHARES),
    *(Way("collective", share, source="joint") for share in _SHARES),
    Way("batched", 0.15, random=True),
    Way("collective", 0.15, random=True),
    Way("batched", 0.15, bottom_right=True),
    Way("batched", 0.3, bottom_right=True),
)
_QUICK = (_FLOOR, Way("batched", 0.15), Way("batched", 0.15, random=True), Way("batched", 0.15, bottom_right=True))
_JUDGED = (_FLOOR, Way("lego", 0.0), Way("batched", 0.15), Way("collective", 0.15, source="joint"))


@dataclass(frozen=True)
class Measured:
    """The cell: way -> its figures (`kvarn.serving.quality.figures.Quality`)."""

    ways: tuple[Way, ...]
    groups: int
    judges: bool = False
    model: str = "smollm2"
    precision: str = "bfloat16"
    seed: int = 0

    alone = False

    @property
    def cost(self) -> float:
        return 10.0 * self.groups * len(self.ways)

    def run(self) -> dict[str, Any]:
        config = engine_config(self.model, self.precision, "auto", "cpu", 16)
        # The published mask knows no chunks, so all rows of a round have room in one step.
        loaded = load_engine(msgspec.structs.replace(config, token_budget=4096))
        encode, decode, frame = texts(loaded)
        make = make_judges if self.judges else make_groups
        found: dict[str, Any] = {}
        for random, bottom_right in sorted({(way.random, way.bottom_right) for way in self.ways}):
            ways = [way for way in self.ways if (way.random, way.bottom_right) == (random, bottom_right)]
            restore = _disturb(loaded, random=random, bottom_right=bottom_right, seed=self.seed)
            groups = make(encode, frame, self.groups, seed=self.seed)
            figures = measure(loaded, [way.settings for way in ways], groups, decode)
            restore()
            found |= {way.name: asdict(each) for way, each in zip(ways, figures, strict=True)}
        loaded.engine.close()
        return found


def _disturb(loaded: LoadedEngine, *, random: bool, bottom_right: bool, seed: int) -> Callable[[], None]:
    """Choose by lot, or mask as published, until the answer is called."""
    rounds, executor = loaded.engine.rounds, loaded.engine.executor
    assert rounds is not None and isinstance(executor, TorchExecutor)
    segments, decoder = rounds.executor, executor.decoder
    if random:
        draw = np.random.default_rng(seed)

        def deviations(probes: Sequence[Probe]) -> list[list[NDArray[np.float32]]]:
            return [[draw.random(each.segment.length, dtype=np.float32) for each in probe.placed] for probe in probes]

        segments.deviations = deviations  # type: ignore[method-assign]
    if bottom_right:
        assert isinstance(decoder, LlamaDecoder)
        executor.decoder = BottomRight(decoder)

    def restore() -> None:
        executor.decoder = decoder
        if random:
            del segments.deviations

    return restore


class BottomRight(LlamaDecoder):
    """A decoder whose rows behind the first gap in a sequence's positions see too much; see the module."""

    def __init__(self, decoder: LlamaDecoder) -> None:
        self.__dict__.update(decoder.__dict__)
        self.native = None

    def _attention(
        self, layer: _Layer, hidden: torch.Tensor, batch: ForwardBatch, kv: KVMemory, index: int, tap: Any
    ) -> torch.Tensor:
        query, key, value = self._heads(layer, hidden)
        pages = kv.layer(index)
        ops.rope_and_cache(query, key, value, self.cos_sin, batch.positions, pages, batch.slots)
        attended: torch.Tensor = ops.paged_attention(
            query, pages, kv.slot_positions, batch.block_tables, batch.kv_slots, batch.query_starts,
            bottom_right(batch.positions, batch.query_starts), self._scale, layer.window,
        )  # fmt: skip
        return attended.flatten(1)


def bottom_right(positions: torch.Tensor, query_starts: torch.Tensor) -> torch.Tensor:
    """[T] the last position that each row sees: of the m rows behind a sequence's first gap, the last m positions."""
    seen = positions.clone()
    starts = query_starts.tolist()
    for start, end in pairwise(starts):
        rows = positions[start:end]
        gaps = torch.nonzero(rows.diff() != 1)
        if len(gaps):
            first = start + int(gaps[0]) + 1
            last = int(rows[-1])
            seen[first:end] = torch.arange(last - (end - first) + 1, last + 1, dtype=positions.dtype)
    return seen


def selection(scope: Scope) -> Part:
    """X7."""
    ways = _QUICK if scope.quick else SELECTIONS
    cell = Measured(ways, {"quick": 1, "default": 4, "full": 12}[scope.level], seed=scope.seed)

    def rows(results: Results) -> list[Row]:
        found = results[cell]
        made = []
        for way in ways:
            figures = found[way.name]
            bar = ""
            if way.random or way.bottom_right:
                usual = found[replace(way, random=False, bottom_right=False).name]
                bar = f"> {usual['mean_kl']:.6f}"
            note = f"{figures['refreshed']:.1%} of shared tokens anew, {figures['tokens']} tokens"
            name = f"x7.{way.name}"
            made += [
                Row(f"{name}.kl", "KL of the next token, exact to reused", "nats", _value(figures["mean_kl"]), "real",
                    bar=bar, note=note),
                Row(f"{name}.top1", "tokens whose likeliest successor is the same", "x", _value(figures["top1"]),
                    "real", note=note),
                Row(f"{name}.perplexity", "perplexity of the exact answers, reused : exact", "x",
                    _value(figures["perplexity_ratio"]), "real", note=note),
            ]  # fmt: skip
        return made

    return Part("x7", "What is computed anew, and how attention is masked", (cell,), rows)


def retrieval(scope: Scope) -> Part:
    """X9."""
    ways = _JUDGED[:2] if scope.quick else _JUDGED
    count = {"quick": 1, "default": 4, "full": 12}[scope.level]
    asked = Measured(ways, count, seed=scope.seed)
    judged = replace(asked, judges=True)

    def rows(results: Results) -> list[Row]:
        made = []
        for way in ways:
            facts, verdicts = results[asked][way.name], results[judged][way.name]
            note = f"the exact engine finds {facts['questions']}"
            if facts["needle"] is not None:
                metric = "facts found in other agents' words, of those found exactly"
                made.append(Row(f"x9.{way.name}.needle", metric, "x", _value(facts["needle"]), "real", note=note))
            metric = "judges who choose whom they choose when nothing is reused"
            made.append(Row(f"x9.{way.name}.judge", metric, "x", _value(verdicts["first"]), "real"))
        return made

    return Part("x9", "Facts across segments, and judges", (asked, judged), rows)


def _value(figure: float) -> Estimate:
    return Estimate(figure)
