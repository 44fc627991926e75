"""What can be set of the agentic policy, and the settings that make it behave like other systems."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal, get_type_hints

from kvarn.errors import KvarnError
from kvarn.serving.policies.options import parse_options

Like = Literal[
    "agentic", "published", "resident", "prefix-lru", "discard", "min-waste", "ttl", "continuum", "program-fcfs",
    "attained-service", "steps",
]  # fmt: skip


@dataclass(frozen=True)
class AgenticSettings:
    """Times in seconds. `like` names a whole set; options given beside it change single settings of that set."""

    like: Like = "agentic"
    order: Literal["response-ratio", "program", "service", "conversation", "request", "published"] = "response-ratio"
    """Who goes first; see kvarn.serving.agents.priority."""
    stall: Literal[
        "hardened", "published", "resident", "finished", "discard", "ttl", "pays-to-keep", "min-waste", "steps"
    ] = "hardened"
    """What becomes of KV while a tool runs; see kvarn.serving.agents.offload."""
    upload: Literal["predictive", "reactive"] = "predictive"
    """Whether it comes back before its tool answers, or when the next request is admitted."""
    gradual: bool = True
    """Whether blocks for that are reserved step by step."""
    lead: int = 8
    """Steps before an upload from which on they are."""
    allowance: float = 0.05
    """Share of the device that conversations on their way back may hold."""
    tenant_share: float = 0.5
    """Share of the device that one tenant's stalled conversations hold undisputed; beyond it they give way first."""
    reserve: Literal["on", "published", "off"] = "on"
    """Blocks set aside for critical roles; see kvarn.serving.agents.reservations."""
    critical: float = 0.5
    """Share of the roles that are critical."""
    growth: float = 0.5
    """Share of an answer's expected blocks that must be free beside its prompt's when it is admitted."""
    preempt: bool = False
    """Whether a critical request takes the place of one that goes behind it: fewer wait for minor ones, at the price of
    more moves; programs end no sooner for it."""
    residence: float = 2.0
    """Seconds that nobody is taken off the device for another's sake after he was admitted."""
    readers: bool = True
    """Whether requests of people who read are paced by what they have before them; see the streaming policy."""
    slack: float = 10.0
    """Seconds of text before him with which a reader makes room for an agent."""
    ttl: float = 5.0
    """For how long the rule "ttl" keeps KV."""
    tick: float = 0.25
    """Between two rankings at most."""
    offload: bool = True
    """Whether KV goes to the host and back; else it is recomputed."""
    prefill_budget: int | None = None
    """Prompt tokens computed in a step that also decodes; None: the whole token budget."""

    @classmethod
    def parse(cls, options: Iterable[str], **others: Any) -> AgenticSettings:
        """Settings from texts like "like=ttl" and "ttl=2"; KvarnError for what is wrong."""
        values = parse_options(cls, options)
        return replace(SETS[values.get("like", "agentic")], **others | values)

    def __post_init__(self) -> None:
        """KvarnError naming the setting that cannot work."""
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if kind in (float, int) and not (isfinite(value) and value >= 0):
                raise KvarnError(f"{name} is {value}; expected a number, 0 or more")
        for name in ("allowance", "tenant_share", "critical", "growth"):
            if getattr(self, name) > 1:
                raise KvarnError(f"{name} is {getattr(self, name)}; expected a share from 0 to 1")
        if not self.tick > 0:
            raise KvarnError(f"tick is {self.tick}; expected a number above 0")


_OURS = AgenticSettings()
_PLAIN = replace(
    _OURS, order="request", upload="reactive", reserve="off", growth=0.0, preempt=False, readers=False, offload=False
)
SETS: dict[Like, AgenticSettings] = {
    "agentic": _OURS,
    "published": replace(_OURS, like="published", order="published", stall="published", reserve="published"),
    "resident": replace(_PLAIN, like="resident", order="conversation", stall="resident"),
    "prefix-lru": replace(_PLAIN, like="prefix-lru", stall="finished"),
    "discard": replace(_PLAIN, like="discard", order="conversation", stall="discard"),
    "min-waste": replace(_PLAIN, like="min-waste", order="conversation", stall="min-waste", offload=True),
    "ttl": replace(_PLAIN, like="ttl", stall="ttl"),
    "continuum": replace(_PLAIN, like="continuum", order="program", stall="pays-to-keep"),
    "program-fcfs": replace(_PLAIN, like="program-fcfs", order="program", stall="finished"),
    "attained-service": replace(_PLAIN, like="attained-service", order="service", stall="finished"),
    "steps": replace(_PLAIN, like="steps", stall="steps", offload=True),
}
"""By name: what other systems do, as far as a policy can say it.

resident is what the paper compares with; prefix-lru what servers do that know nothing of tools (with a host tier it is
one that reacts to pressure); min-waste InferCept; continuum a time to live that pays, and programs in order;
attained-service Autellix; steps KVFlow. An oracle of durations is any of them whose clients' estimates are true.
"""
