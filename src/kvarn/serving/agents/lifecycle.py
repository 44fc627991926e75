"""A tool call from the engine's side, and every rule of how it goes. This file owns the state machine.

While an agent's tool runs, the KV of the agent's conversation is of use to nobody, and will be of use again. A call is
where that KV is meanwhile, and what is known of when it ends. Holding means that nobody else gets the blocks:

    KEPT        held on the device
    OFFLOADING  being copied to the host, its device blocks free as the copies end
    OFFLOADED   held on the host; on the device by luck alone
    RESERVING   as that, and taking blocks of the device piece by piece, to come back to
    UPLOADING   being copied back
    READY       held on the device again, and on the host still
    RELEASED    held nowhere: what is left of it is prefix cache like any other
    DEAD        over: gone on from, closed, or past its deadline; remembered for a while, for clients that come late

                  +------------------------------> RELEASED --+
                  |                                           |
    start --> KEPT --> OFFLOADING --> OFFLOADED <--> RESERVING --> UPLOADING --> READY --(request comes)--> DEAD
                             |             ^------------------------------------'
                             '-(cancelled)-> KEPT

The tool's end changes no place, so it is legal in every state but DEAD: it only says that the next request is near. A
request that goes on from the conversation ends the call wherever its KV is; it finds it by content.

Source: TokenCake (arXiv 2510.18586), sections 2 and 3, whose `call_start` and `call_finish` these are.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kvarn.errors import IllegalTransition
from kvarn.serving.agents.forecast import Forecast
from kvarn.serving.agents.hints import AgentHints


class CallState(enum.StrEnum):
    KEPT = "kept"
    OFFLOADING = "offloading"
    OFFLOADED = "offloaded"
    RESERVING = "reserving"
    UPLOADING = "uploading"
    READY = "ready"
    RELEASED = "released"
    DEAD = "dead"


_S = CallState
LEGAL: dict[CallState, frozenset[CallState]] = {
    _S.KEPT: frozenset({_S.OFFLOADING, _S.RELEASED, _S.DEAD}),
    _S.OFFLOADING: frozenset({_S.OFFLOADED, _S.KEPT, _S.RELEASED, _S.DEAD}),
    _S.OFFLOADED: frozenset({_S.RESERVING, _S.UPLOADING, _S.READY, _S.RELEASED, _S.DEAD}),
    _S.RESERVING: frozenset({_S.OFFLOADED, _S.UPLOADING, _S.RELEASED, _S.DEAD}),
    _S.UPLOADING: frozenset({_S.READY, _S.OFFLOADED, _S.RELEASED, _S.DEAD}),
    _S.READY: frozenset({_S.OFFLOADED, _S.RELEASED, _S.DEAD}),
    _S.RELEASED: frozenset({_S.DEAD}),
    _S.DEAD: frozenset(),
}
"""From each state, those that may follow."""
ON_DEVICE = frozenset({_S.KEPT, _S.READY})
"""States in which device blocks are held that could be given up at once."""


@dataclass(slots=True, eq=False)
class Call:
    """One call. Times in seconds on the engine's clock."""

    id: str
    """Of the request that made it."""
    tenant: str
    agent: AgentHints
    tool: str
    started: float
    forecast: Forecast
    """Of how it goes on, as far as is known by now."""
    deadline: float
    """When it is given up."""
    num_tokens: int = 0
    """Of the conversation so far."""
    first_forecast: Forecast = field(init=False)
    """What was said when it began: the one that is judged by how long it took."""
    explicit: bool = False
    """Whether the client has said that it began."""
    retained: bool = False
    """No tool runs: the client asked to have the conversation kept for a while."""
    state: CallState = CallState.KEPT
    moved_at: float = float("-inf")
    """When the state last changed."""
    finished_at: float = float("inf")
    """When the tool answered."""
    successor: str = ""
    """The request that goes on from it, while that waits."""
    looked_at: float = field(default=float("-inf"))
    """When a policy last decided to leave it where it is."""

    def __post_init__(self) -> None:
        self.first_forecast = self.forecast

    @property
    def finished(self) -> bool:
        """Whether the tool has answered."""
        return self.finished_at != float("inf")

    returned: bool = False
    """Whether its KV has been brought back to the device before."""

    def move_to(self, state: CallState, now: float) -> None:
        """Apply one transition of the table; an illegal one raises IllegalTransition."""
        if state not in LEGAL[self.state]:
            raise IllegalTransition(f"call of request {self.id}: {self.state.value} -> {state.value}")
        self.state, self.moved_at = state, now
        self.returned |= state is CallState.READY

    def remaining(self, now: float, quantile: float = 0.5) -> float:
        """Seconds until the tool will have answered; 0 once it has."""
        return 0.0 if self.finished else self.forecast.remaining(now - self.started, quantile)

    def early(self, now: float, quantile: float) -> float:
        """Seconds until the tool has answered with this probability; once the KV has come back in vain, as far as can
        be said of a call that has lasted so long."""
        if self.finished:
            return 0.0
        read = self.forecast.remaining if self.returned else self.forecast.until
        return read(now - self.started, quantile)
