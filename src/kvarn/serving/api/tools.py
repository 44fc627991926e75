"""Function tools: what a request offers and forces, and how an answer's text becomes tool calls.

`ToolPlan` says which tools the template shows and which grammar the answer must follow; an `AnswerParser` for each
sequence splits its text into pieces of plain text and of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from uuid import uuid4

from kvarn.errors import RequestError
from kvarn.models.tool_parsers import (
    ContentDelta,
    ToolCallArguments,
    ToolCallStart,
    ToolEvent,
    forced_tool_grammar,
    tool_parser,
)
from kvarn.serving.api.generation import Delta
from kvarn.serving.api.schemas import ChatRequest, tools_json
from kvarn.serving.api.text import ModelText
from kvarn.serving.sampling.params import Grammar

MANY_CALLS = 2**31


@dataclass(frozen=True, slots=True)
class TextPiece:
    text: str


@dataclass(frozen=True, slots=True)
class CallPiece:
    """The start of a call (`id` and `name` set) or more of its arguments."""

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """offered: tools the model is told of, in OpenAI's form. forced: it must call one (or just `only`)."""

    offered: list[dict[str, Any]] = field(default_factory=list)
    forced: bool = False
    only: str | None = None
    parallel: bool = True

    @classmethod
    def of_chat(cls, body: ChatRequest) -> Self:
        choice = body.tool_choice
        only = None if choice is None or isinstance(choice, str) else choice.function.name
        return cls.make(
            tools_json(body.tools), choice if isinstance(choice, str) else None, only, body.parallel_tool_calls
        )

    @classmethod
    def make(cls, tools: list[dict[str, Any]], mode: str | None, only: str | None, parallel: bool | None) -> Self:
        """Raises RequestError for a choice that the tools do not allow."""
        names = [tool["function"]["name"] for tool in tools]
        if (mode == "required" or only is not None) and not tools:
            raise RequestError(
                "tool_choice asks for a call and there are no tools; send tools too", field="tool_choice"
            )
        if only is not None and only not in names:
            raise RequestError(f"tool_choice names {only!r}; the tools are {', '.join(names)}", field="tool_choice")
        if len(set(names)) < len(names):
            raise RequestError("two tools have the same name; give each its own", field="tools")
        if mode == "none":
            return cls()
        return cls(tools, mode == "required" or only is not None, only, parallel is not False)

    def grammar(self, text: ModelText) -> Grammar | None:
        """What the answer must follow when a call is forced. Raises RequestError for tools that no grammar can say."""
        if not self.forced:
            return None
        try:
            kind, source = forced_tool_grammar(text.tool_format, self.offered, self.only, parallel=self.parallel)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"a tool's parameters are no JSON schema ({error})", field="tools") from error
        return Grammar(kind, source)

    @property
    def names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.offered]


class AnswerParser:
    """One answer's text, split as it comes. Without tools it is passed on as it is."""

    def __init__(
        self, text: ModelText, plan: ToolPlan, on_calls: Callable[[Mapping[str, str]], None] = lambda calls: None
    ) -> None:
        """`on_calls` hears of the calls (id -> name) of an answer that ends with them."""
        self._parser = tool_parser(text.tool_format, plan.names) if plan.offered else None
        self._calls_allowed = MANY_CALLS if plan.parallel else 1
        self._on_calls = on_calls
        self._calls: dict[str, str] = {}

    @property
    def has_calls(self) -> bool:
        return bool(self._calls)

    def push(self, delta: Delta) -> list[TextPiece | CallPiece]:
        """What is certain after `delta`; everything that remains when it is the last."""
        if self._parser is None:
            return [TextPiece(delta.text)] if delta.text else []
        events = self._parser.push(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            events = events + self._parser.finish()
        pieces = [piece for piece in map(self._piece, events) if piece is not None]
        if delta.finish_reason == "stop" and self._calls:
            self._on_calls(self._calls)
        return pieces

    def _piece(self, event: ToolEvent) -> TextPiece | CallPiece | None:
        match event:
            case ContentDelta(text):
                return TextPiece(text)
            case ToolCallStart(index, name) if index < self._calls_allowed:
                id = f"call_{uuid4().hex[:24]}"
                self._calls[id] = name
                return CallPiece(index, "", id=id, name=name)
            case ToolCallArguments(index, text) if index < self._calls_allowed:
                return CallPiece(index, text)
            case _:
                return None  # a second call where the client wants one at a time
