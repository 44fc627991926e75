"""Which model call a tool call belongs to, and when all of a model call's tools have answered.

A model may ask for several tools at once, but its conversation goes on only when the last has answered: so the server
is told of one start, at the first tool's, and of one finish, at the last tool's. Pure; may be shared by threads.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from kvarn.serving.agents.events import CallFinish, CallStart
from kvarn.serving.agents.hints import UNKNOWN

_MOST_OPEN = 4096
"""Model calls whose tools never end are forgotten, the oldest first, beyond this many."""


@dataclass
class _Asked:
    """A model call that asked for tools: their names by the ids of the tool calls that have not ended."""

    open_tools: dict[str, str]
    started: bool = False


class OpenCalls:
    """`tool_seconds` is how long tools are expected to take, by name; others are left for the server to learn."""

    def __init__(self, tool_seconds: Mapping[str, float] | None = None) -> None:
        self._tool_seconds = dict(tool_seconds or {})
        self._asked: dict[str, _Asked] = {}
        self._lock = threading.Lock()

    def answered(self, request: str, tools: Mapping[str, str]) -> None:
        """The model call whose answer has id `request` asks for `tools`: names by tool call id."""
        if not request or not tools:
            return
        with self._lock:
            self._asked[request] = _Asked(dict(tools))
            while len(self._asked) > _MOST_OPEN:
                del self._asked[next(iter(self._asked))]

    def started(self, call: str) -> CallStart | None:
        """What to tell the server now that this tool call starts. With several tools, it names the slowest."""
        with self._lock:
            request, asked = self._find(call)
            if asked is None or asked.started:
                return None
            asked.started = True
            slowest = max(asked.open_tools.values(), key=lambda tool: self._tool_seconds.get(tool, UNKNOWN))
        return CallStart(request, tool=slowest, seconds=self._tool_seconds.get(slowest, UNKNOWN))

    def ended(self, call: str) -> CallFinish | None:
        """What to tell the server now that this tool call has ended, well or not."""
        with self._lock:
            request, asked = self._find(call)
            if asked is None:
                return None
            del asked.open_tools[call]
            if asked.open_tools:
                return None
            del self._asked[request]
        return CallFinish(request)

    def _find(self, call: str) -> tuple[str, _Asked | None]:
        """Latest first: tools run soon after they were asked for."""
        for request, asked in reversed(self._asked.items()):
            if call in asked.open_tools:
                return request, asked
        return "", None
