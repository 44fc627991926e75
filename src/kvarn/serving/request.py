"""A request and its states.

One state machine, one table. A request waits until the policy grants it tokens; it then runs (prefill and
decode are both "running": what differs is how many tokens it has left to compute) until it finishes. A
preempted request gives its KV blocks back and waits again; its tokens are kept, so recomputing them
(Source: vLLM's recompute preemption) gives the same continuation. What the host still has of its KV can be loaded
instead: it then holds blocks, but takes no part in steps until they are filled.

    WAITING --grant---------------> RUNNING --last token--> FINISHED
     ^   ^ --load--> LOADING --filled--^ |
     |   +--failed-----+                 |
     +-----------preempt-----------------+     cancel, deadline and faults lead to FINISHED from everywhere
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvarn.errors import IllegalTransition
from kvarn.serving.agents.hints import UNKNOWN, AgentHints
from kvarn.serving.reader import DEFAULT_RATE, Reader
from kvarn.serving.rounds.hints import RoundHint, Segment
from kvarn.serving.rounds.layout import Layout
from kvarn.serving.sampling.params import SamplingParams

_OUTPUT_ROOM = 256
"""Output tokens to make room for at first; the buffer doubles when it is full."""


class RequestState(enum.Enum):
    WAITING = "waiting"
    LOADING = "loading"
    RUNNING = "running"
    FINISHED = "finished"


_LEGAL = {
    (RequestState.WAITING, RequestState.RUNNING),
    (RequestState.RUNNING, RequestState.WAITING),
    (RequestState.WAITING, RequestState.LOADING),
    (RequestState.LOADING, RequestState.RUNNING),
    (RequestState.LOADING, RequestState.WAITING),
    (RequestState.WAITING, RequestState.FINISHED),
    (RequestState.LOADING, RequestState.FINISHED),
    (RequestState.RUNNING, RequestState.FINISHED),
}


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence being generated. Owned and changed by the engine alone.

    `tokens` holds prompt and output; the first `num_tokens` entries are valid and the first `num_computed`
    of them have their KV in the blocks of `block_table`; with a layout, they are counted in its order.
    """

    id: str
    prompt_length: int
    params: SamplingParams
    tokens: NDArray[np.int32]
    arrival: float
    """Seconds on the engine's clock."""
    tenant: str = ""
    """Salt of the prefix cache: equal prefixes of different tenants never share blocks."""
    priority: int = 0
    """Lower runs first."""
    deadline: float = float("inf")
    """Seconds on the engine's clock after which the request is given up."""
    stop_tokens: frozenset[int] = frozenset()
    """End-of-sequence and stop token ids that end this request."""
    state: RequestState = RequestState.WAITING
    num_tokens: int = 0
    num_computed: int = 0
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache at first admission."""
    block_table: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    """Ids of the KV blocks held, in token order; the first `num_blocks` entries are valid."""
    num_blocks: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    """Chained content hashes of the full blocks of `tokens`, extended as tokens arrive."""
    indexed_blocks: int = 0
    """How many leading blocks are in the prefix index."""
    prefix_entry: int = 0
    """The index entry of the last of them (see kvcache.prefix); 0 is the root."""
    preemptions: int = 0
    moved_at: float = float("-inf")
    """When it last was admitted, loaded or preempted, on the engine's clock."""
    reader: Reader = field(default_factory=Reader)
    """Who reads the tokens, and how far he is."""
    agent: AgentHints | None = None
    """What its client says of the agent behind it."""
    continues: str = ""
    """The request whose tool call this one answers."""
    may_call: bool = False
    """Whether it may end with a tool call."""
    retain_seconds: float = UNKNOWN
    """How long its client wants its KV kept after its end."""
    segments: tuple[Segment, ...] = ()
    """The parts of its prompt, where its client says them."""
    round: RoundHint | None = None
    layout: Layout | None = None
    """Where its prompt's KV is, where some of it is that of shared segments; see kvarn.serving.rounds.layout."""
    slot_surplus: int = 0
    """Slots that its KV takes in its own blocks, less its tokens: below 0 where it reads KV of others in place."""
    reused_tokens: int = 0
    """Prompt tokens whose KV is that of shared segments."""
    finish_reason: FinishReason | None = None

    @classmethod
    def create(
        cls,
        id: str,
        prompt: list[int] | NDArray[np.int32],
        params: SamplingParams,
        *,
        arrival: float,
        eos_tokens: frozenset[int] = frozenset(),
        tenant: str = "",
        priority: int = 0,
        deadline: float = float("inf"),
        stream_rate: float = DEFAULT_RATE,
        agent: AgentHints | None = None,
        continues: str = "",
        may_call: bool = False,
        retain_seconds: float = UNKNOWN,
        segments: tuple[Segment, ...] = (),
        round: RoundHint | None = None,
    ) -> Request:
        tokens = np.empty(len(prompt) + min(params.max_tokens, _OUTPUT_ROOM), dtype=np.int32)
        tokens[: len(prompt)] = prompt
        stop_tokens = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_tokens)
        return cls(
            id=id, prompt_length=len(prompt), params=params, tokens=tokens, arrival=arrival, tenant=tenant,
            priority=priority, deadline=deadline, stop_tokens=stop_tokens, num_tokens=len(prompt),
            reader=Reader(stream_rate), agent=agent, continues=continues, may_call=may_call or agent is not None,
            retain_seconds=retain_seconds, segments=segments, round=round,
        )  # fmt: skip

    def move_to(self, state: RequestState) -> None:
        """Apply one transition of the table; an illegal one raises IllegalTransition."""
        if (self.state, state) not in _LEGAL:
            raise IllegalTransition(f"request {self.id}: {self.state.value} -> {state.value}")
        self.state = state

    @property
    def blocks(self) -> list[int]:
        """Ids of the KV blocks held, in token order."""
        held: list[int] = self.block_table[: self.num_blocks].tolist()
        return held

    def add_blocks(self, blocks: list[int]) -> None:
        """Append block ids to the block table."""
        total = self.num_blocks + len(blocks)
        if total > len(self.block_table):
            grown = np.empty(max(total, 2 * len(self.block_table), 8), dtype=np.int32)
            grown[: self.num_blocks] = self.block_table[: self.num_blocks]
            self.block_table = grown
        self.block_table[self.num_blocks : total] = blocks
        self.num_blocks = total

    @property
    def known_tokens(self) -> NDArray[np.int32]:
        """Prompt and output so far."""
        return self.tokens[: self.num_tokens]

    def set_layout(self, layout: Layout | None) -> None:
        self.layout = layout
        self.slot_surplus = 0 if layout is None else layout.surplus
        if layout is not None:  # at its end, what it reused is still to be told
            self.reused_tokens = layout.reused

    @property
    def num_slots(self) -> int:
        """Slots in its own blocks that the KV of its tokens takes."""
        return self.num_tokens + self.slot_surplus

    @property
    def exact_limit(self) -> int:
        """Leading tokens whose KV can be exact: all, without shared segments."""
        return self.num_tokens if self.layout is None else self.layout.prefix

    @property
    def exact_tokens(self) -> int:
        """Leading tokens whose exact KV is in its blocks."""
        if self.layout is None:
            return self.num_computed
        return min(max(0, self.num_computed - self.layout.reused), self.layout.prefix)

    @property
    def num_outputs(self) -> int:
        return self.num_tokens - self.prompt_length

    @property
    def max_outputs(self) -> int:
        """Output tokens it may have."""
        return self.params.max_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose KV is missing: 1 in decode, more in prefill."""
        return self.num_tokens - self.num_computed

    def write_drafts(self, drafts: list[int]) -> None:
        """Put guesses at the next tokens behind the valid ones, to be computed; they do not count as tokens."""
        self._make_room(len(drafts))
        self.tokens[self.num_tokens : self.num_tokens + len(drafts)] = drafts

    def _make_room(self, count: int) -> None:
        if self.num_tokens + count > len(self.tokens):
            self.tokens = np.concatenate([self.tokens, np.empty(len(self.tokens) + count, dtype=np.int32)])

    def append(self, token: int) -> FinishReason | None:
        """Add one output token; the reason when it is the last."""
        place, params = self.num_tokens, self.params
        if place == len(self.tokens):
            self._make_room(1)
        self.tokens[place] = token
        self.num_tokens = place + 1
        outputs = place + 1 - self.prompt_length
        if token in self.stop_tokens and outputs > params.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if outputs >= params.max_tokens else None
