"""Requests as the desk sees them, and events of every kind."""

from __future__ import annotations

from dataclasses import dataclass

from kvarn.serving.agents.desk import Desk
from kvarn.serving.agents.events import AgentEvent, CallFinish, CallProgress, CallStart, Close
from kvarn.serving.agents.hints import UNKNOWN, AgentHints
from kvarn.serving.agents.lifecycle import Call


@dataclass
class Turn:
    """A request that has ended, or will."""

    id: str
    tenant: str = ""
    agent: AgentHints | None = None
    continues: str = ""
    arrival: float = 0.0
    num_tokens: int = 100
    retain_seconds: float = UNKNOWN


class DeskWithTurns(Desk[Turn]):
    def end(self, turn: Turn, now: float = 0.0) -> Call | None:
        """A request that came and has ended."""
        self.note_added(turn, now)
        return self.note_ended(turn, now, goes_on=True)


TOLD: list[AgentEvent] = [
    CallStart("r", "b"),
    CallProgress("r", "b", fraction=0.5),
    CallFinish("r", "b"),
    Close("r", "b"),
    Close("", "b", "p"),
]
"""Of tenant b."""
