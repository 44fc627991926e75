"""What can be set of the streaming policy, with what the published method calls it and the default taken here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, get_type_hints

from kvarn.errors import KvarnError
from kvarn.serving.policies.options import parse_options


@dataclass(frozen=True)
class StreamingSettings:
    """Times in seconds. Switches turn single ideas off, to see what each is worth."""

    tick: float = 0.25
    """Between two looks at who should be on the device (the paper's Delta t)."""
    safety: float = 1.5
    """A request may make room for a newcomer once it has this many times the slack that the detour takes (mu)."""
    contraction: float = 0.25
    """How far the number of requests served at once is held back from what memory allows (lambda of Eq. 5)."""
    urgency: float = 10.0
    """Weight of an empty buffer against a token's own value (gamma, in queueing delays)."""
    horizon: float = 6.0
    """Slack over which urgency falls to 1/e, in ticks and detours. A long one shares slack out evenly, which forgives
    readers who are faster than they say."""
    gain: Literal["corrected", "published"] = "corrected"
    """"published": Eq. 3 to the letter, whose sign ranks an empty buffer last and whose scale is tokens."""
    retention: float = 1.2
    """A request stays on the device unless another gains so many times as much by being there."""
    overload: float = 1.0
    """Readers are let in until together they read so many times what the device is estimated to generate (Eq. 6)."""
    relief: float = 0.05
    """Once overloaded, until demand is this share below that."""
    residence_steps: float = 8.0
    """Steps that a request stays where it was moved to, at least."""
    residence_switches: float = 4.0
    """And so many times as long as a move takes."""
    patience: float = 2.0
    """Ticks after which a reader who waits in the middle of his text comes before everything."""
    max_preemptions: int = 64
    """A request that has given way so often does so only for want of blocks."""
    pause_above: float = 0.2
    """Share of the expected text unread from which a resident request skips steps."""
    pause_below: float = 0.1
    """Share at which it goes on."""
    load_ahead: float = 0.5
    """Ticks that loads may queue: blocks being waited for serve nobody."""
    headroom_blocks: int = 1
    """Blocks left free per running request at admission."""
    prefill_budget: int | None = None
    """Prompt tokens computed in a step that others' readers wait for; None: the whole token budget."""
    prefill_floor: float = 0.125
    """Share of that budget which is computed however short of tokens those readers are."""

    offload: bool = True
    """Copy what has no copy before giving it up, and load instead of recomputing where that costs less."""
    pause: Literal["needed", "eager", "always", "off"] = "needed"
    """When well-supplied residents skip steps: while somebody short of tokens reads faster than steps with all of them
    come; or while anybody is short of tokens or waits; or even while nobody is. A step costs little less for a row
    less, so the latter two cost tokens per second, and with them the time of newcomers and the buffers that bursts are
    survived with; they raise the share of tokens that are made just in time."""
    local_search: bool = True
    hysteresis: bool = True
    """Retention, minimum residence, and the charge for what others wait when somebody comes back."""

    @classmethod
    def parse(cls, options: Iterable[str], **others: Any) -> StreamingSettings:
        """Settings from texts like "tick=0.5" and "pause=eager", and `others` by name; KvarnError for what is wrong."""
        return cls(**others | parse_options(cls, options))

    def __post_init__(self) -> None:
        """KvarnError naming the setting that cannot work."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind in (float, int) and not (isfinite(value) and value >= 0):
                raise KvarnError(f"{name} is {value}; expected a number, 0 or more")
        for name in ("tick", "safety", "urgency", "horizon", "overload", "load_ahead"):
            if not getattr(self, name) > 0:
                raise KvarnError(f"{name} is {getattr(self, name)}; expected a number above 0")
        if self.prefill_budget is not None and self.prefill_budget < 1:
            raise KvarnError(f"prefill_budget is {self.prefill_budget}; expected 1 or more")
        if not 0 <= self.contraction <= 1:
            raise KvarnError(f"contraction is {self.contraction}; expected a share from 0 to 1")
        if not 0 <= self.pause_below <= self.pause_above:
            raise KvarnError(f"pause_below is {self.pause_below}; expected 0 to pause_above ({self.pause_above})")
