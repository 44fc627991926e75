"""What a scheduling policy sees and what it answers. Pure: the same snapshot and time give the same decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class RequestView(Protocol):
    """A request, read only (kvarn.serving.request.Request satisfies it)."""

    @property
    def id(self) -> str: ...
    @property
    def priority(self) -> int: ...
    @property
    def arrival(self) -> float: ...
    @property
    def prompt_length(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_computed(self) -> int: ...
    @property
    def num_uncomputed(self) -> int: ...
    @property
    def num_outputs(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def preemptions(self) -> int: ...


class PrefixHitView(Protocol):
    @property
    def tokens(self) -> int: ...
    @property
    def idle_blocks(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine's state at the moment of a decision."""

    waiting: Sequence[RequestView]
    """Ordered by priority, then arrival."""
    running: Sequence[RequestView]
    """In the order of admission."""
    available_blocks: int
    """Free blocks and cached ones that may be evicted."""
    block_size: int
    token_budget: int
    """Tokens that one step may compute."""
    max_running: int
    prefix_hit: Callable[[str], PrefixHitView]
    """What the prefix cache holds of the waiting request of this id."""
    reclaimable_blocks: Callable[[str], int]
    """Blocks that preempting the running request of this id makes available."""

    shares_prefix: Callable[[str, str, int], bool]
    """Whether so many first tokens of the waiting request (first id) will be cached once the other's are computed."""

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


class Grant(NamedTuple):
    """Compute `tokens` more tokens of this request in this step."""

    id: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Decision:
    """Preempt first, then compute the grants together. A grant to a waiting request admits it."""

    preempt: tuple[str, ...] = ()
    grants: tuple[Grant, ...] = ()


class Policy(Protocol):
    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        """What to do in the step that begins at `now` (engine clock, seconds)."""
        ...
