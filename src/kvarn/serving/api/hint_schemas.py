"""Advice that clients may send with a request, as they write it; `kvarn.serving.api.hints` says what becomes of it.

Wrong types are refused. What is too long, too large or unknown is not: a hint never makes a request fail. The round is
no advice: who names one means it, so a round that cannot be is refused.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from kvarn.serving.api.segments import LARGEST_ROUND, LONGEST_NAME
from kvarn.serving.rounds.hints import RoundHint

_INT32 = 2**31 - 1


class Body(BaseModel):
    """Strict about types, so that a number sent as a string is an error and not a guess."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class AgentFields(Body):
    """kvarn.serving.agents.hints.AgentHints as JSON. Times in seconds."""

    program: str | None = None
    agent: str | None = None
    node: str | None = None
    after: Annotated[list[str], Field(fail_fast=True)] | None = None
    depth: int | None = None
    fan_in: int | None = None
    fan_out: int | None = None
    remaining_seconds: float | None = None
    total_seconds: float | None = None
    critical: bool | None = None
    join: str | None = None
    importance: int | None = Field(None, description="0 to 10, among the agents of the same API key")
    tool: str | None = None
    tool_seconds: float | None = None


class HintAction(Body):
    verb: str = Field(description="retain, pin, demote; others are answered as ignored")
    seconds: float | None = None


class KVHints(Body):
    """The envelope."""

    protocol_version: int | None = Field(None, description="1")
    message_id: str | None = Field(None, description="said again in the answer")
    agent: AgentFields | None = None
    actions: Annotated[list[HintAction], Field(fail_fast=True)] | None = None


class NvAgentHints(Body):
    priority: int | None = Field(None, description="higher runs first: the other sign")


class NvExt(Body):
    agent_hints: NvAgentHints | None = None


Name = Annotated[str, Field(max_length=LONGEST_NAME)]


class RoundBody(Body):
    """The group of requests that get the same shared segments at about the same time."""

    id: Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
    size: int = Field(ge=1, le=LARGEST_ROUND, description="requests that the round has in all")
    agent: Name | None = Field(None, description="whose request this is: at most one of each in a round")


class HintFields(Body):
    """Fields of chat and plain completions and of responses."""

    round: RoundBody | None = Field(None, description="extension; the round that the request belongs to")

    priority: int | None = Field(None, ge=-_INT32, le=_INT32, description="extension; lower runs first")
    prompt_cache_key: str | None = Field(None, description="names the program where nothing else does")
    kv_hints: KVHints | None = Field(None, description="extension; facts of the agent that asks")
    nvext: NvExt | None = Field(None, description="extension; agent_hints.priority is read")

    @property
    def round_hint(self) -> RoundHint | None:
        """The round, as the engine reads it."""
        return None if self.round is None else RoundHint(self.round.id, self.round.size, self.round.agent or "")

    @property
    def hint_fields(self) -> dict[str, Any]:
        """The hints as plain values, unknown ones too; fields that were not sent or are null are left out."""
        names = {"priority", "prompt_cache_key", "kv_hints", "nvext"}
        return self.model_dump(include=names, exclude_none=True)
