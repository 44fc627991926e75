"""What a scheduling policy sees and what it answers. Pure: the same snapshot and time give the same decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from kvarn.serving.agents.hints import AgentHints
from kvarn.serving.agents.lifecycle import Call
from kvarn.serving.agents.moves import StallMove
from kvarn.serving.agents.programs import Program


class ReaderView(Protocol):
    """Who reads a request's tokens (kvarn.serving.reader.Reader satisfies it)."""

    @property
    def rate(self) -> float: ...
    @property
    def started(self) -> bool: ...
    def dry_at(self) -> float: ...
    def slack(self, now: float) -> float: ...
    def buffer(self, now: float) -> int: ...


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
    def num_slots(self) -> int:
        """Slots in its own blocks that the KV of its tokens takes."""
        ...

    @property
    def slot_surplus(self) -> int:
        """Slots less tokens: not 0 where it has a part in shared segments."""
        ...

    @property
    def preemptions(self) -> int: ...
    @property
    def moved_at(self) -> float: ...
    @property
    def max_outputs(self) -> int: ...
    @property
    def reader(self) -> ReaderView: ...
    @property
    def tenant(self) -> str: ...
    @property
    def agent(self) -> AgentHints | None: ...


class StallView(Protocol):
    """A conversation whose agent waits for a tool (kvarn.serving.stalls.Stall satisfies it)."""

    @property
    def id(self) -> str: ...
    @property
    def call(self) -> Call: ...
    @property
    def held_blocks(self) -> int:
        """Device blocks held for it, shared ones included."""
        ...

    @property
    def reserved_blocks(self) -> int:
        """Of these, those held for its return."""
        ...


class AgentView(Protocol):
    """What the engine knows of agents (kvarn.serving.stalls.AgentBooks satisfies it)."""

    @property
    def is_empty(self) -> bool:
        """Whether there is neither a call nor a request of a program."""
        ...

    @property
    def is_away(self) -> bool:
        """Whether any conversation is to be brought back to the device, or on its way."""
        ...

    @property
    def stalls(self) -> Sequence[StallView]: ...

    def began(self, request_id: str) -> float:
        """When the conversation of a request that has not ended began."""
        ...

    def program(self, request_id: str) -> Program | None:
        """The program of a request; None for a request of nobody's agent."""
        ...

    def call_of(self, request_id: str) -> Call | None:
        """The call that a waiting request goes on from."""
        ...

    def unmirrored_blocks(self, id: str) -> int:
        """Blocks of a stall on the device that have no copy on the host."""
        ...

    def loadable_blocks(self, id: str) -> int:
        """Blocks of a stall that the device lacks and other tiers have."""
        ...


class CostView(Protocol):
    """What things have lately cost, in seconds (kvarn.serving.costs.Costs satisfies it)."""

    def decode_seconds(self, rows: int, context: int) -> float: ...
    def prefill_seconds(self, tokens: int) -> float: ...


class TierView(Protocol):
    """What the engine knows of KV on the host and on disk."""

    @property
    def host_blocks(self) -> int:
        """Blocks the host has room for in all."""
        ...

    @property
    def free_host_blocks(self) -> int:
        """Blocks that could be copied there now."""
        ...

    @property
    def coming_blocks(self) -> int:
        """Blocks that nobody uses any more and that come free when copies under way have ended."""
        ...

    def loadable_tokens(self, id: str) -> int:
        """Leading tokens of a waiting request that all tiers hold together."""
        ...

    def unmirrored_blocks(self, id: str) -> int:
        """Blocks of a running request without a copy on the host, finished or under way; a partial one counts."""
        ...

    def write_seconds(self, blocks: int) -> float:
        """Until so many more blocks would be on the host, behind what is queued already."""
        ...

    def read_seconds(self, blocks: int) -> float:
        """Until so many more blocks would be back on the device, behind what is queued already."""
        ...

    def load_seconds(self, id: str, blocks: int) -> float:
        """Until all the `blocks` that a waiting request may load, from wherever they are, would be on the device."""
        ...


class PrefixHitView(Protocol):
    @property
    def tokens(self) -> int: ...
    @property
    def blocks(self) -> int: ...
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
    num_blocks: int
    """Blocks of the device in all."""
    prefix_hit: Callable[[str], PrefixHitView]
    """What the prefix cache holds of the waiting request of this id."""
    reclaimable_blocks: Callable[[str], int]
    """Blocks that preempting the running request of this id makes available."""

    shares_prefix: Callable[[str, str, int], bool]
    """Whether so many first tokens of the waiting request (first id) will be cached once the other's are computed."""

    costs: CostView
    loading: Sequence[RequestView] = ()
    """Requests whose blocks are on their way back from the host: they hold device blocks and run when filled."""
    tiers: TierView | None = None
    """None without a host tier."""
    agents: AgentView | None = None
    """None where the policy does not ask for agents."""

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


class Grant(NamedTuple):
    """Compute `tokens` more tokens of this request in this step."""

    id: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Decision:
    """In this order: take requests off the device, bring others back, compute the grants together.

    A grant to a waiting request admits it, with what the device still holds of it; the rest is recomputed.
    """

    preempt: tuple[str, ...] = ()
    """Running requests that give their blocks back now; what has no copy on the host is lost."""
    grants: tuple[Grant, ...] = ()
    offload: tuple[str, ...] = ()
    """As preempt, but blocks without a copy are copied first, and come free when that is done."""
    load: tuple[str, ...] = ()
    """Waiting requests to bring back from the host; ignored where that cannot be done now."""
    stalls: tuple[StallMove, ...] = ()
    """What is to become of stalled conversations; done before everything else."""
    wake_at: float = float("inf")
    """When to decide again at the latest, if nothing was granted and nothing else happens."""


class Policy(Protocol):
    def decide(self, snapshot: Snapshot, now: float) -> Decision:
        """What to do in the step that begins at `now` (engine clock, seconds)."""
        ...
