"""Rounds of small prompts for engines that hold texts: parts, requests, and engines of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvarn.serving.engine import Engine
from kvarn.serving.policies.registry import POLICIES
from kvarn.serving.request import Request
from kvarn.serving.rounds.hints import RoundHint, Segment, SegmentKind
from kvarn.serving.rounds.settings import ReuseSettings
from tests.serving.paged_text import make_engine, make_request

Part = tuple[SegmentKind, list[int]]


def words(length: int, seed: int) -> list[int]:
    """Tokens that stand nowhere else."""
    return [(seed * 131 + i * (7 + 2 * seed)) % 900 for i in range(length)]


def private(length: int, seed: int) -> Part:
    return "private", words(length, seed)


def shared(length: int, seed: int) -> Part:
    return "shared", words(length, 50 + seed)


def member(
    id: str,
    parts: Sequence[Part],
    count: int = 4,
    *,
    round: RoundHint | None = None,
    told: bool = True,
    **fields: object,
) -> Request:
    """A request of these parts; without `told`, nobody says where they are."""
    prompt = [token for _, tokens in parts for token in tokens]
    segments = tuple(Segment(kind, len(tokens)) for kind, tokens in parts) if told else ()
    return make_request(id, prompt, count, segments=segments, round=round, **fields)


def in_round(agent: int, parts: Sequence[Part], count: int = 4, *, of: int, id: str = "R", **fields: object) -> Request:
    """Agent so-and-so of a round of so many."""
    hint = RoundHint(id, of, f"agent {agent:02}")
    return member(f"{id} {agent}", parts, count, round=hint, **fields)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Kind:
    """How an engine reuses and schedules."""

    mode: str = "collective"
    dense: bool = False
    policy: str = "fcfs"
    host_slots: int = 0


KINDS = (
    Kind("serial"), Kind("batched"), Kind("collective"), Kind("lego"), Kind("collective", dense=True),
    Kind("lego", dense=True), Kind("collective", policy="streaming", host_slots=24),
    Kind("batched", policy="streaming", host_slots=24), Kind("serial", policy="streaming", host_slots=12),
    Kind("lego", policy="agentic", host_slots=24), Kind("batched", policy="agentic", host_slots=8),
    Kind("collective", policy="agentic"),
)  # fmt: skip


def society(kind: Kind, *, sink: int = 2, share: float = 0.3, wait: float = 5.0, **engine: object) -> Engine:
    """An engine with blocks of four tokens that reuses segments of five or more."""
    reuse = ReuseSettings(
        mode=kind.mode, share=share, wait=wait, sink_tokens=sink, joint_sink=sink, shortest=5,  # type: ignore[arg-type]
        share_blocks=not kind.dense,
    )  # fmt: skip
    return make_engine(
        reuse=reuse, policy=POLICIES[kind.policy](16), host_slots=kind.host_slots, agents=kind.policy == "agentic",
        **engine,  # type: ignore[arg-type]
    )  # fmt: skip
