"""News of tool calls, from clients to the engine: `request` is the id of the model call that made the tool call.

Also what the engine answers. Every event may come twice; see kvarn.serving.agents.lifecycle for what is legal when.
"""

from __future__ import annotations

import msgspec

from kvarn.serving.agents.hints import UNKNOWN


class CallStart(msgspec.Struct, tag="call_start", array_like=True, frozen=True):
    """The request has ended, or is about to, and its agent waits for a tool."""

    request: str
    tenant: str = ""
    tool: str = ""
    seconds: float = UNKNOWN
    """The client's estimate."""
    stages: tuple[str, ...] = ()
    """Names of its parts, in order."""
    implicit: bool = False
    """Whether the server has concluded it from the answer; a client that says it too adds to it."""


class CallProgress(msgspec.Struct, tag="call_progress", array_like=True, frozen=True):
    """The call has come to a stage, or so far."""

    request: str
    tenant: str = ""
    stage: str = ""
    fraction: float = UNKNOWN
    """0 to 1."""


class CallFinish(msgspec.Struct, tag="call_finish", array_like=True, frozen=True):
    """The tool has answered: the agent goes on soon."""

    request: str
    tenant: str = ""
    seconds: float = UNKNOWN
    """What it took; measured from the start where the client does not say."""


class Close(msgspec.Struct, tag="close", array_like=True, frozen=True):
    """Nobody will go on from this request, or from any of this program."""

    request: str = ""
    tenant: str = ""
    program: str = ""


AgentEvent = CallStart | CallProgress | CallFinish | Close


class CallReport(msgspec.Struct, array_like=True):
    """Where a call stands after an event. Times in seconds."""

    request: str
    state: str
    """A CallState value."""
    expected_seconds: float = UNKNOWN
    """Of the whole call, as forecast when it began."""
    remaining_seconds: float = UNKNOWN
    deadline_seconds: float = UNKNOWN
    """Until it is given up."""
    held_blocks: int = 0
    """KV blocks kept on the device for it."""
    closed: int = 0
    """Calls that a close has ended."""
    elapsed_seconds: float = UNKNOWN
    """Since it began, or what it took."""
