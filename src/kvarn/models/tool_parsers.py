"""Tool calls in the text that models write: finding them in a stream, and the grammar that forces them.

Each model family writes calls in its own format, known by its chat template. A parser takes text as it comes and gives
content and calls; it does no I/O. Text is passed on as soon as it cannot be part of a call; a call is held back until
it is complete, and what turns out to be malformed comes out as the content it is.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final, Protocol

from kvarn.models.chat import ChatTemplate


class ToolFormat(enum.StrEnum):
    """How a model writes calls."""

    TAGGED = "tagged"
    """`<tool_call>{"name": .., "arguments": {..}}</tool_call>`, one tag a call (Hermes, Qwen)."""
    TAGGED_LIST = "tagged_list"
    """`<tool_call>[{"name": .., "arguments": {..}}, ..]</tool_call>` (SmolLM2, and any model told by our preamble)."""
    MISTRAL = "mistral"
    """`[TOOL_CALLS][{"name": .., "arguments": {..}}, ..]`, or `[TOOL_CALLS]name[ARGS]{..}` a call."""
    LLAMA = "llama"
    """`{"name": .., "parameters": {..}}` and nothing else, maybe after `<|python_tag|>`, calls separated by `;`."""
    JSON = "json"
    """A bare JSON call or list of calls, and nothing else."""


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """More plain text."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """Call number `index` (from 0) begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of the arguments of call `index`: JSON text."""

    index: int
    text: str


ToolEvent = ContentDelta | ToolCallStart | ToolCallArguments


class ToolParser(Protocol):
    """One answer's parser."""

    def push(self, text: str) -> list[ToolEvent]:
        """What is certain after `text` has come."""
        ...

    def finish(self) -> list[ToolEvent]:
        """What remains when the answer has ended."""
        ...


def detect_format(template: ChatTemplate) -> ToolFormat:
    """The format that a chat template teaches its model."""
    if not template.knows_tools:
        return ToolFormat.TAGGED_LIST
    source = "\n".join(template.sources.values())
    if "[TOOL_CALLS]" in source:
        return ToolFormat.MISTRAL
    if "<tool_call>[" in source:
        return ToolFormat.TAGGED_LIST
    if "<tool_call>" in source:
        return ToolFormat.TAGGED
    if "<|python_tag|>" in source or re.search(r"""["']parameters["']\s*:""", source):
        return ToolFormat.LLAMA
    return ToolFormat.JSON


def tool_parser(format: ToolFormat, tool_names: Collection[str]) -> ToolParser:
    """A parser for one answer. Where calls are bare JSON, only those to `tool_names` count as calls."""
    match format:
        case ToolFormat.TAGGED | ToolFormat.TAGGED_LIST:
            return _TaggedParser()
        case ToolFormat.MISTRAL:
            return _WholeParser(_MISTRAL_MARK, tool_names)
        case ToolFormat.LLAMA:
            return _WholeParser(_LLAMA_MARK, tool_names)
        case ToolFormat.JSON:
            return _WholeParser("", tool_names)


# ---- parsing ---------------------------------------------------------------------------------------------

_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"
_MISTRAL_MARK: Final = "[TOOL_CALLS]"
_LLAMA_MARK: Final = "<|python_tag|>"
_MISTRAL_CALL: Final = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][\w-]*)?\s*(?:\[ARGS\])?\s*(?=\{)")
_CALL_KEYS: Final = ("name", "type", "id", "function", "parameters", "arguments")
_CALL_BEGINNING: Final = re.compile(r"\s*\[?\s*\{?\s*(\"\w*)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    arguments: str


class _Emitter:
    """Numbers the calls of one answer."""

    def __init__(self) -> None:
        self.count = 0

    def calls(self, calls: list[_Call]) -> list[ToolEvent]:
        events: list[ToolEvent] = []
        for call in calls:
            events += [ToolCallStart(self.count, call.name), ToolCallArguments(self.count, call.arguments)]
            self.count += 1
        return events


class _TaggedParser:
    """Calls between tags, with content before, between and after. White space before a call belongs to the call."""

    def __init__(self) -> None:
        self._emitter = _Emitter()
        self._buffer = ""
        self._inside = False
        self._gap = ""
        """White space that is content unless a call follows."""

    def push(self, text: str) -> list[ToolEvent]:
        self._buffer += text
        events: list[ToolEvent] = []
        while True:
            before, found, rest = self._buffer.partition(_CLOSE if self._inside else _OPEN)
            if not found:
                break
            events += self._call(before, _CLOSE) if self._inside else self._content(before)
            self._inside, self._buffer = not self._inside, rest
        if not self._inside:
            ready = len(self._buffer) - _held_back(self._buffer, _OPEN)
            events += self._content(self._buffer[:ready])
            self._buffer = self._buffer[ready:]
        return events

    def finish(self) -> list[ToolEvent]:
        # A model that stops right after its JSON means the call; the closing tag may be its end-of-text.
        events = self._call(self._buffer, "") if self._inside else self._content(self._buffer)
        if self._gap and not self._emitter.count:
            events.append(ContentDelta(self._gap))
        return events

    def _call(self, text: str, close: str) -> list[ToolEvent]:
        calls = _parse_calls(text)
        if calls is None:
            return self._content(_OPEN + text + close)
        self._gap = ""
        return self._emitter.calls(calls)

    def _content(self, text: str) -> list[ToolEvent]:
        text = self._gap + text
        solid = text.rstrip()
        self._gap = text[len(solid) :]
        return [ContentDelta(solid)] if solid else []


class _WholeParser:
    """Calls from a mark (or the answer's first character) to its end: the rest is held back and parsed at the end."""

    def __init__(self, mark: str, tool_names: Collection[str]) -> None:
        self._emitter = _Emitter()
        self._mark = mark
        self._names = frozenset(tool_names)
        self._buffer = ""
        self._marked = False
        self._plain = False
        """The answer has begun with text that is no call."""
        self._gap = ""
        """White space before the mark."""

    def push(self, text: str) -> list[ToolEvent]:
        self._buffer += text
        if self._marked or (not self._plain and _may_begin_call(self._buffer)):
            return []
        if self._mark:
            before, found, rest = self._buffer.partition(self._mark)
            if found:
                self._marked, self._buffer = True, rest
                if before.strip():
                    return [ContentDelta(before)]
                self._gap = before
                return []
        ready = len(self._buffer) - _held_back(self._buffer, self._mark)
        if not self._plain and not self._buffer[:ready].strip():
            return []
        self._plain = True
        content, self._buffer = self._buffer[:ready], self._buffer[ready:]
        return [ContentDelta(content)] if content else []

    def finish(self) -> list[ToolEvent]:
        buffer, self._buffer = self._buffer, ""
        calls = None if self._plain and not self._marked else _parse_calls(buffer)
        if calls is not None and (self._marked or all(call.name in self._names for call in calls)):
            return self._emitter.calls(calls)
        content = self._gap + self._mark + buffer if self._marked else buffer
        return [ContentDelta(content)] if content else []


def _held_back(text: str, mark: str) -> int:
    """Length of the longest end of `text` that may be the beginning of `mark`."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-size:])), 0)


def _may_begin_call(text: str) -> bool:
    """Whether an answer that begins with `text` can still be a bare JSON call."""
    beginning = _CALL_BEGINNING.match(text)
    if beginning is None:
        return False
    key = (beginning[1] or "")[1:]
    if beginning.end() == len(text):
        return any(known.startswith(key) for known in _CALL_KEYS)
    return key in _CALL_KEYS and text[beginning.end()] == '"'


def _parse_calls(text: str) -> list[_Call] | None:
    """The calls that `text` consists of; None when it holds anything else."""
    decoder = json.JSONDecoder()
    calls: list[_Call] = []
    at = 0
    while rest := text[at:].strip(" \n\r\t;,"):
        at = len(text) - len(text[at:].lstrip(" \n\r\t;,"))
        name = _MISTRAL_CALL.match(text, at)
        if rest.startswith((_MISTRAL_MARK, _LLAMA_MARK)):
            at += len(_MISTRAL_MARK if rest.startswith(_MISTRAL_MARK) else _LLAMA_MARK)
            continue
        try:
            value, at = decoder.raw_decode(text, name.end() if name else at)
        except (ValueError, RecursionError):
            return None
        for item in value if isinstance(value, list) else [value]:
            call = _call_of({"name": name[1], "arguments": item} if name else item)
            if call is None:
                return None
            calls.append(call)
    return calls or None


def _call_of(value: Any) -> _Call | None:
    """A call out of one JSON value, in any of the forms that models were trained on."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models quote the arguments as OpenAI's API does
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return None
    if not isinstance(arguments, dict):
        return None
    return _Call(value["name"], json.dumps(arguments, ensure_ascii=False))


# ---- forcing ---------------------------------------------------------------------------------------------


_TIGHT: Final = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}
"""JSON spaced the one way that models were trained on: small ones write white space for ever where they may."""


def forced_tool_grammar(
    format: ToolFormat, tools: list[dict[str, Any]], name: str | None = None, *, parallel: bool = True
) -> tuple[str, str]:
    """(kind, source) of a grammar under which the answer is a call, in the model's own format.

    tools     OpenAI tool definitions; their `parameters` schemas hold for the arguments
    name      the one tool to call; None for any of them
    parallel  whether there may be several calls
    """
    chosen = [tool for tool in tools if name is None or tool["function"]["name"] == name]
    key = "parameters" if format is ToolFormat.LLAMA else "arguments"
    definitions: dict[str, Any] = {}
    calls = [_call_schema(tool["function"], key, definitions) for tool in chosen]
    call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    many: dict[str, Any] = {"type": "array", "items": call, "minItems": 1} | ({} if parallel else {"maxItems": 1})
    if format is ToolFormat.LLAMA:
        return "json_schema", _schema_text(call, definitions)
    if format in (ToolFormat.MISTRAL, ToolFormat.JSON):
        return "json_schema", _schema_text(many, definitions)
    if format is ToolFormat.TAGGED_LIST:
        return "lark", f'start: "{_OPEN}" calls "{_CLOSE}"\ncalls: %json {_schema_text(many | _TIGHT, definitions)}\n'
    one = f'"{_OPEN}\\n" call "\\n{_CLOSE}"'
    more = f' ("\\n" {one})*' if parallel else ""
    return "lark", f"start: {one}{more}\ncall: %json {_schema_text(call | _TIGHT, definitions)}\n"


def _call_schema(function: dict[str, Any], key: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a call. Definitions inside the tool's own schema move to the top, under the tool's name."""
    parameters = dict(function.get("parameters") or {"type": "object"})
    for home in ("$defs", "definitions"):
        for title, schema in (parameters.pop(home, None) or {}).items():
            definitions[f"{function['name']}.{title}"] = _moved(schema, function["name"])
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, key: _moved(parameters, function["name"])},
        "required": ["name", key],
        "additionalProperties": False,
    }


def _moved(schema: Any, tool: str) -> Any:
    """`schema` with its references pointing to where `_call_schema` put the definitions."""
    if isinstance(schema, list):
        return [_moved(item, tool) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, tool) for key, value in schema.items()}
    if isinstance(schema.get("$ref"), str):
        moved["$ref"] = re.sub(r"^#/(?:\$defs|definitions)/", f"#/$defs/{tool}.", schema["$ref"])
    return moved


def _schema_text(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    return json.dumps(schema | ({"$defs": definitions} if definitions else {}))
