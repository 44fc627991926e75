"""What a client says of the agent behind a request. Advice: it may change when things happen, never what is computed.

A *program* is one run of an application, made of *nodes*; a node that is a model call belongs to an *agent*, its role.
Every field may be left out; what a graph front end knows of a node is computed by `kvarn.serving.agents.graph`.

Source: TokenCake (arXiv 2510.18586), section 2 of the paper, for what a graph tells a scheduler.
"""

from __future__ import annotations

import msgspec

UNKNOWN = -1.0
"""Of a time that nobody has said."""
MOST_IMPORTANT = 10


class AgentHints(msgspec.Struct, frozen=True, omit_defaults=True):
    """Facts of one model call. Times in seconds."""

    program: str = ""
    """The run of an application that it belongs to; empty: the request is a program of its own."""
    agent: str = ""
    """The role, such as "reviewer"; durations and importance are learnt by it."""
    node: str = ""
    """Its place in the program's graph."""
    after: tuple[str, ...] = ()
    """Nodes that had to end before this one: for people who watch."""
    depth: int = 0
    """Place on the longest way from a first node, from 1; 0: unknown."""
    fan_in: int = 0
    fan_out: int = 0
    remaining_seconds: float = UNKNOWN
    """Expected from this node's start to the program's end, along the longest way."""
    total_seconds: float = UNKNOWN
    """The same from the program's start."""
    critical: bool = False
    """Whether the program's end waits for it."""
    join: str = ""
    """Those of a program with the same join are waited for together."""
    importance: int = 0
    """0 to MOST_IMPORTANT: among the agents of the same tenant."""
    tool: str = ""
    """The tool that it is expected to call at its end."""
    tool_seconds: float = UNKNOWN
    """How long that is expected to take."""
