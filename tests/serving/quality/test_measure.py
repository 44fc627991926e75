"""Quality of reuse: nothing is lost where all is computed anew, and what is lost otherwise is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvarn.errors import KvarnError
from kvarn.serving.assemble import load_engine
from kvarn.serving.config import EngineConfig
from kvarn.serving.quality.figures import Quality
from kvarn.serving.quality.groups import Frame, Group, Prompt, make_groups, prompt_of
from kvarn.serving.quality.measure import measure
from kvarn.serving.rounds.settings import ReuseSettings

ALL_ANEW = [
    ReuseSettings("batched", 1.0),
    ReuseSettings("serial", 1.0),
    ReuseSettings("collective", 1.0),
    ReuseSettings("lego", lego_blocks=99),
]


def config(model: Path, **settings: object) -> EngineConfig:
    usual = {"precision": "float32", "reuse": "batched", "reuse_share": 1.0, "kv_memory_bytes": 2**24}
    return EngineConfig(model=str(model), speculation="off", **{**usual, **settings})  # type: ignore[arg-type]


def random_groups(count: int) -> list[Group]:
    """Three agents, two texts of 50 tokens, histories of different lengths."""
    draw = np.random.default_rng(1)

    def words(length: int) -> list[int]:
        return draw.integers(3, 49000, length).tolist()

    groups = []
    for _ in range(count):
        begin, shared = words(8), [words(50), words(60)]
        tasks = [
            prompt_of(
                [("private", begin + words(10 + 7 * i)), ("shared", shared[i % 2]), ("private", words(3)),
                 ("shared", shared[1 - i % 2]), ("task", words(9))]
            )
            for i in range(3)
        ]  # fmt: skip
        questions = [Prompt(task.tokens, task.segments, " ") for task in tasks]
        groups.append(Group(tuple(tasks), tuple(questions)))
    return groups


def quality_of(model: Path, ways: list[ReuseSettings], groups: int = 1, **settings: object) -> list[Quality]:
    loaded = load_engine(config(model, **settings))
    try:
        return measure(loaded, ways, random_groups(groups), lambda tokens: " ".join(map(str, tokens)))
    finally:
        loaded.engine.close()


def test_computing_everything_anew_changes_nothing(small_model: Path) -> None:
    for quality in quality_of(small_model, ALL_ANEW, groups=2):
        assert quality.tokens == 2 * 3 * 32
        assert abs(quality.mean_kl) < 1e-4
        assert quality.p95_kl < 1e-4
        assert quality.top1 == 1
        assert quality.needle == 1
        assert quality.refreshed == 1


def test_blocks_that_others_had_before_leave_nothing_behind(small_model: Path) -> None:
    """Copies lie aligned in own blocks: the slots between them must be empty, whatever stood there."""
    ways = [ReuseSettings("batched", share) for share in (1.0, 0.1) * 4]
    measured = quality_of(small_model, ways, groups=2, kv_memory_bytes=2**20)
    assert all(quality.p95_kl < 1e-4 for quality in measured[::2])
    assert [quality.mean_kl for quality in measured[1::2]] == pytest.approx([measured[1].mean_kl] * 4, rel=1e-3)


def test_what_reuse_changes_is_seen_and_modes_that_compute_the_same_agree(small_model: Path) -> None:
    ways = [ReuseSettings(mode, 0.1) for mode in ("serial", "batched", "collective")]
    loaded = load_engine(config(small_model))
    serial, batched, collective = (
        measure(loaded, [way], random_groups(1), lambda tokens: " ".join(map(str, tokens)))[0] for way in ways
    )  # one engine measures as often as one likes
    assert serial.mean_kl == pytest.approx(batched.mean_kl, rel=1e-3)
    assert 0.05 < batched.refreshed <= 0.1
    assert 0.05 < collective.refreshed < 0.3  # whole blocks, of which the last has fewer tokens
    for quality in (batched, collective):
        assert quality.mean_kl > 1e-3
        assert quality.p95_kl >= quality.mean_kl / 2
        assert quality.perplexity_ratio > 0


def test_an_engine_without_rounds_is_refused(small_model: Path) -> None:
    with pytest.raises(KvarnError, match="mode of reuse"):
        quality_of(small_model, [ReuseSettings()], reuse="exact", reuse_share=0.0)


def test_groups_are_the_same_for_the_same_seed_and_hold_the_facts_that_are_asked_for() -> None:
    def encode(text: str) -> list[int]:
        return list(text.encode())

    frame = Frame("<", "|", ">")
    groups = list(make_groups(encode, frame, 6, seed=3))
    assert groups == list(make_groups(encode, frame, 6, seed=3))
    assert groups != list(make_groups(encode, frame, 6, seed=4))
    assert sorted({len(group.tasks) for group in groups}) == [4, 5, 6]
    for group in groups:
        shared = [sorted(parts_of(prompt, "shared")) for prompt in (*group.tasks, *group.questions)]
        assert all(each == shared[0] for each in shared)
        assert len({tuple(parts_of(prompt, "shared")) for prompt in group.tasks}) > 1, "all have the same order"
        for question in group.questions:
            holding = [part for part in shared[0] if question.answer in part]
            assert len(holding) == 1
            beginning = parts_of(question, "task")[0].rpartition(">")[2]
            assert f"{beginning} {question.answer}" in holding[0]


def parts_of(prompt: Prompt, kind: str) -> list[str]:
    """Its texts of one kind; tokens are bytes."""
    assert sum(part.tokens for part in prompt.segments) == len(prompt.tokens)
    texts, position = [], 0
    for part in prompt.segments:
        if part.kind == kind:
            texts.append(bytes(prompt.tokens[position : position + part.tokens]).decode())
        position += part.tokens
    return texts
