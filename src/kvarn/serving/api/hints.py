"""What becomes of a request's hints: facts for the engine, and for the client an outcome of each hint it gave.

In come fields of the body (`hint_schemas.HintFields`, already of the right types), headers and the policy's name; out
comes `Hints`. Nothing here fails: what is too much is clipped, what is unknown or said twice is ignored, and each
outcome that is not "accepted" has a reason. Where two hints differ, the envelope `kv_hints` counts, then the
headers in the order of the tables below, then prompt_cache_key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from kvarn.serving.agents.hints import MOST_IMPORTANT, UNKNOWN, AgentHints

AGENTIC: Final = "agentic"
"""The policy that uses hints. All use the priority."""
PROTOCOL_VERSION: Final = 1
LONGEST_TEXT, MOST_AFTER, MOST_NODES, MOST_ACTIONS = 200, 64, 10_000, 16
LONGEST_SECONDS = 86_400.0
MOST_RETAIN_SECONDS, USUAL_RETAIN_SECONDS = 3600.0, 300.0
"""How long an answer's KV is kept at most, and where a client names no time."""
MANY_UNKNOWN = 32
"""More unknown fields than these are counted and not named."""
MOST_PRIORITY = 2**31 - 1

_PARENTS: Final = ("x-dynamo-parent-session-id", "x-parent-session-id", "x-codex-parent-thread-id")
_SESSIONS: Final = (
    *("x-dynamo-session-id", "x-session-id", "x-claude-code-session-id", "session-id", "thread-id"),
    *("x-multi-turn-session-id", "x-grok-conv-id", "x-session-affinity"),
)
_NODES: Final = ("x-claude-code-agent-id",)
_BEFORE: Final = ("x-claude-code-parent-agent-id",)
_FINAL: Final = "x-dynamo-session-final"

_TEXTS: Final = ("program", "agent", "node", "join", "tool")
_MOST: Final[dict[str, float]] = {
    "depth": MOST_NODES,
    "fan_in": MOST_NODES,
    "fan_out": MOST_NODES,
    "importance": MOST_IMPORTANT,
    **dict.fromkeys(("remaining_seconds", "total_seconds", "tool_seconds"), LONGEST_SECONDS),
}
_NOT_NEEDED: Final = dict.fromkeys(("prefetch", "share"), "KV is shared and found by content")

Result = Literal["accepted", "clipped", "ignored"]


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one hint."""

    hint: str
    outcome: Result
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Hints:
    """A request's hints as the engine takes them, and what to answer."""

    agent: AgentHints | None = None
    priority: int = 0
    """Lower runs first."""
    retain_seconds: float = UNKNOWN
    """How long to keep the answer's KV; 0: not at all; UNKNOWN: nobody said."""
    outcomes: tuple[Outcome, ...] = ()
    message_id: str = ""

    def answer(self) -> dict[str, Any]:
        """The answer's field `kv_hints`; nothing where no hint was given."""
        if not self.outcomes:
            return {}
        facts = {"protocol_version": PROTOCOL_VERSION} | ({"message_id": self.message_id} if self.message_id else {})
        return {"kv_hints": facts | {"outcomes": self.outcomes}}

    def headers(self) -> dict[str, str]:
        """The same as a response header. Names that a header cannot hold are left to the body."""
        short = [(outcome.hint.removeprefix("kv_hints.").removeprefix("agent."), outcome) for outcome in self.outcomes]
        told = [f"{name}={each.outcome}" for name, each in short if re.fullmatch(r"[\w.-]{1,80}", name, re.ASCII)]
        return {"x-kv-hints": ", ".join(told)} if told else {}


NO_HINTS: Final = Hints()


def read_hints(fields: Mapping[str, Any], headers: Mapping[str, str], policy: str) -> Hints:
    """The hints of a request: `fields` of its body, without nulls; `headers` by lower-case name."""
    reader = _Reader("" if policy == AGENTIC else f"the policy is {policy}; only {AGENTIC} uses it")
    envelope = fields.get("kv_hints") or {}
    message_id = ""
    if (version := envelope.get("protocol_version", PROTOCOL_VERSION)) != PROTOCOL_VERSION:
        said = str(version)[:20]
        reader.ignore("kv_hints", f"protocol_version is {said}; this server speaks {PROTOCOL_VERSION}")
    else:
        message_id = envelope.get("message_id", "")[:LONGEST_TEXT]
        reader.read_agent(envelope.get("agent") or {})
        reader.read_actions(envelope.get("actions") or [])
        reader.ignore_unknown("kv_hints", envelope, {"protocol_version", "message_id", "agent", "actions"})
    reader.read_headers(headers)
    if key := fields.get("prompt_cache_key"):
        reader.take_text("prompt_cache_key", "program", key)
    priority = reader.read_priority(fields)
    retain_seconds = reader.facts.pop("retain_seconds", UNKNOWN)
    agent = AgentHints(**reader.facts) if reader.facts else None
    return Hints(agent, priority, retain_seconds, tuple(reader.finish()), message_id)


@dataclass(slots=True)
class _Reader:
    """Facts so far, who said each, and the outcomes."""

    unused: str
    """Why the policy uses no hints; empty: it does."""
    facts: dict[str, Any] = field(default_factory=dict)
    _said_by: dict[str, str] = field(default_factory=dict)
    _outcomes: list[Outcome] = field(default_factory=list)
    _unknown: int = 0

    def finish(self) -> list[Outcome]:
        if (more := self._unknown - MANY_UNKNOWN) > 0:
            self.ignore("kv_hints", f"{more} more fields are unknown")
        return self._outcomes

    def ignore(self, hint: str, reason: str) -> None:
        self._outcomes.append(Outcome(hint, "ignored", reason))

    def ignore_unknown(self, where: str, given: Mapping[str, Any], known: set[str]) -> None:
        for name in given:
            if name not in known:
                self._unknown += 1
                if self._unknown <= MANY_UNKNOWN:
                    self.ignore(f"{where}.{name[:80]}", "unknown here")

    def take(self, hint: str, name: str, value: Any, clipped: str = "") -> None:
        """Keep a fact, unless a hint before it says otherwise."""
        if self.facts.setdefault(name, value) != value:
            self.ignore(hint, f"{self._said_by[name]} says otherwise")
            return
        self._said_by.setdefault(name, hint)
        if self.unused:
            self.ignore(hint, self.unused)
        else:
            self._outcomes.append(Outcome(hint, "clipped" if clipped else "accepted", clipped))

    def take_text(self, hint: str, name: str, text: str) -> None:
        if not text:
            self.ignore(hint, "it is empty")
            return
        long = f"it has {len(text)} characters; {LONGEST_TEXT} are kept" if len(text) > LONGEST_TEXT else ""
        self.take(hint, name, text[:LONGEST_TEXT], long)

    def take_number(self, hint: str, name: str, number: float, most: float, clipped: str = "") -> None:
        if number < 0:
            clipped, number = f"{str(number)[:20]} is below 0", type(number)(0)
        elif number > most:
            clipped, number = f"{str(number)[:20]} is above {most:g}", type(number)(most)
        self.take(hint, name, number, clipped)

    def take_after(self, hint: str, nodes: list[str]) -> None:
        reasons = []
        if len(nodes) > MOST_AFTER:
            reasons.append(f"it names {len(nodes)} nodes; {MOST_AFTER} are kept")
        if any(len(node) > LONGEST_TEXT for node in nodes[:MOST_AFTER]):
            reasons.append(f"{LONGEST_TEXT} characters of a name are kept")
        self.take(hint, "after", tuple(node[:LONGEST_TEXT] for node in nodes[:MOST_AFTER]), "; ".join(reasons))

    def read_agent(self, agent: Mapping[str, Any]) -> None:
        known = {*_TEXTS, *_MOST, "after", "critical"}
        for name, value in agent.items():
            hint = f"kv_hints.agent.{name}"
            if name not in known:
                continue
            if name in _TEXTS:
                self.take_text(hint, name, value)
            elif name == "after":
                self.take_after(hint, value)
            elif name == "critical":
                self.take(hint, name, value)
            elif value == UNKNOWN and name.endswith("seconds"):
                self.ignore(hint, "-1 stands for a time that nobody knows")
            else:
                self.take_number(hint, name, value, _MOST[name])
        self.ignore_unknown("kv_hints.agent", agent, known)

    def read_actions(self, actions: list[dict[str, Any]]) -> None:
        for index, action in enumerate(actions[:MOST_ACTIONS]):
            hint, verb = f"kv_hints.actions.{index}", action["verb"]
            match verb:
                case "retain" | "pin":
                    seconds = action.get("seconds", USUAL_RETAIN_SECONDS)
                    soft = "a pin is soft here: kept while there is room" if verb == "pin" else ""
                    self.take_number(hint, "retain_seconds", float(seconds), MOST_RETAIN_SECONDS, soft)
                case "demote":
                    self.take(hint, "retain_seconds", 0.0)
                case _:
                    reason = f"unknown verb {verb[:40]!r}; retain, pin and demote are known"
                    self.ignore(hint, _NOT_NEEDED.get(verb, reason))
            self.ignore_unknown(hint, action, {"verb", "seconds"})
        if len(actions) > MOST_ACTIONS:
            self.ignore("kv_hints.actions", f"there are {len(actions)}; the first {MOST_ACTIONS} are read")

    def read_headers(self, headers: Mapping[str, str]) -> None:
        """A session names the program; one with a parent is a node of the parent's."""
        session = "node" if any(headers.get(name) for name in _PARENTS) else "program"
        rows = [(name, "program") for name in _PARENTS] + [(name, session) for name in _SESSIONS]
        for header, name in rows + [(name, "node") for name in _NODES]:
            if header in headers:
                self.take_text(header, name, headers[header])
        for header in _BEFORE:
            if header in headers:
                self.take_after(header, [headers[header]])
        if (final := headers.get(_FINAL)) is not None:
            if final.lower() in ("true", "1"):
                self.take(_FINAL, "retain_seconds", 0.0)
            else:
                self.ignore(_FINAL, 'only "true" means anything')

    def read_priority(self, fields: Mapping[str, Any]) -> int:
        """Lower runs first; nvext has the other sign."""
        priority: int | None = fields.get("priority")
        if priority is not None:
            self._outcomes.append(Outcome("priority", "accepted"))
        nv = (fields.get("nvext") or {}).get("agent_hints") or {}
        hint = "nvext.agent_hints.priority"
        if (theirs := nv.get("priority")) is not None:
            if priority is not None and priority != -theirs:
                self.ignore(hint, "priority says otherwise")
            else:
                priority = max(-MOST_PRIORITY, min(-theirs, MOST_PRIORITY))
                clipped = "" if priority == -theirs else f"it is beyond {MOST_PRIORITY}"
                self._outcomes.append(Outcome(hint, "clipped" if clipped else "accepted", clipped))
        self.ignore_unknown("nvext.agent_hints", nv, {"priority"})
        return priority or 0
