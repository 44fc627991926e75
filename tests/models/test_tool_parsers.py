"""Tool calls in model text: found whatever the cuts of the stream, and never at the cost of plain text."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import llguidance
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn.models.chat import ChatTemplate
from kvarn.models.tokenizer import Tokenizer
from kvarn.models.tool_parsers import (
    ContentDelta,
    ToolCallArguments,
    ToolCallStart,
    ToolEvent,
    ToolFormat,
    detect_format,
    forced_tool_grammar,
    tool_parser,
)

ADD = '{"name": "add", "arguments": {"a": 1, "note": "<tool>"}}'
NOW = '{"name": "now", "arguments": {}}'
ARGUMENTS = {"a": 1, "note": "<tool>"}
ONE = [("add", ARGUMENTS)]
BOTH = [("add", ARGUMENTS), ("now", {})]
WRITTEN: list[tuple[ToolFormat, str, str, list[tuple[str, Any]]]] = [
    (ToolFormat.TAGGED, f"<tool_call>\n{ADD}\n</tool_call>", "", ONE),
    (
        ToolFormat.TAGGED,
        f"Let me see.\n<tool_call>{ADD}</tool_call>\n<tool_call>{NOW}</tool_call>",
        "Let me see.",
        BOTH,
    ),
    (ToolFormat.TAGGED, f"<tool_call>\n{ADD}", "", ONE),
    (ToolFormat.TAGGED_LIST, f"<tool_call>[{ADD}, {NOW}]</tool_call>", "", BOTH),
    (ToolFormat.MISTRAL, f"[TOOL_CALLS][{ADD}, {NOW}]", "", BOTH),
    (ToolFormat.MISTRAL, f"[TOOL_CALLS] [{ADD}]", "", ONE),
    (ToolFormat.MISTRAL, f"[{ADD}]", "", ONE),
    (
        ToolFormat.MISTRAL,
        'Sure.[TOOL_CALLS]add[ARGS]{"a": 1, "note": "<tool>"}[TOOL_CALLS]now[ARGS]{}',
        "Sure.",
        BOTH,
    ),
    (ToolFormat.LLAMA, ADD.replace("arguments", "parameters"), "", ONE),
    (ToolFormat.LLAMA, f"<|python_tag|>{ADD}; {NOW}", "", BOTH),
    (ToolFormat.JSON, f" [{ADD}, {NOW}]\n", "", BOTH),
    (ToolFormat.JSON, f'{{"type": "function", "function": {ADD}}}', "", ONE),
    (ToolFormat.JSON, '{"name": "now", "arguments": "{}"}', "", [("now", {})]),
]
PLAIN = [
    "Hello <b>there</b>, 1 < 2 and [x] {y}.",
    '{"name": "Ada", "age": 36}',
    '{"answer": 42}',
    "[1, 2, 3]",
    "{",
    "[TOOL",
    "<tool_call>not json</tool_call> after",
    "<tool_call>[1, 2]</tool_call>",
    '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
    "text <tool_call>{\"name\": ",
    "[TOOL_CALLS] oops",
    "  \n",
    "",
]  # fmt: skip
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "parameters": {
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/Number"}, "note": {"type": "string"}},
                "required": ["a", "note"],
                "additionalProperties": False,
                "$defs": {"Number": {"type": "integer"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]


def parse(format: ToolFormat, text: str, cuts: list[int]) -> list[ToolEvent]:
    parser = tool_parser(format, ["add", "now"])
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    events: list[ToolEvent] = []
    for start, end in itertools.pairwise(edges):
        events += parser.push(text[start:end])
    return events + parser.finish()


def content(events: list[ToolEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, ContentDelta))


def calls(events: list[ToolEvent]) -> list[tuple[str, Any]]:
    names = [event.name for event in events if isinstance(event, ToolCallStart)]
    arguments = [""] * len(names)
    for event in events:
        if isinstance(event, ToolCallArguments):
            arguments[event.index] += event.text
    return [(name, json.loads(text)) for name, text in zip(names, arguments, strict=True)]


@given(case=st.sampled_from(WRITTEN), cuts=st.lists(st.integers(0, 200), max_size=60))
def test_calls_are_found_however_the_stream_is_cut(
    case: tuple[ToolFormat, str, str, list[tuple[str, Any]]], cuts: list[int]
) -> None:
    format, text, expected_content, expected_calls = case
    events = parse(format, text, cuts)
    assert content(events).strip() == expected_content
    assert calls(events) == expected_calls


@given(format=st.sampled_from(ToolFormat), text=st.sampled_from(PLAIN) | st.text(), cuts=st.lists(st.integers(0, 60)))
def test_text_without_a_valid_call_comes_out_unchanged(format: ToolFormat, text: str, cuts: list[int]) -> None:
    events = parse(format, text, cuts)
    assert content(events) == text
    assert calls(events) == []


@pytest.mark.parametrize("format", ToolFormat)
def test_plain_text_is_not_held_back(format: ToolFormat) -> None:
    parser = tool_parser(format, ["add"])
    assert content(parser.push("Well")) == "Well"
    assert content(parser.push(" then,")) == " then,"
    assert content(parser.push(" a<b")) == " a<b"


@pytest.mark.parametrize("format", [ToolFormat.JSON, ToolFormat.LLAMA])
def test_json_that_is_an_answer_flows_from_its_first_foreign_key(format: ToolFormat) -> None:
    parser = tool_parser(format, ["add"])
    assert parser.push('{"na') == []
    assert content(parser.push('tion": ')) == '{"nation": '


@pytest.mark.parametrize(
    ("source", "format"),
    [
        ("{{ messages }}", ToolFormat.TAGGED_LIST),
        ("{{ tools }}<tool_call>\n{", ToolFormat.TAGGED),
        ("{{ tools }}[AVAILABLE_TOOLS][TOOL_CALLS]", ToolFormat.MISTRAL),
        ("{{ tools }}<|python_tag|>", ToolFormat.LLAMA),
        ("""{{ tools }}'{"name": function name, "parameters": dictionary}'""", ToolFormat.LLAMA),
        ("{{ tools }}", ToolFormat.JSON),
    ],
)
def test_the_format_is_told_by_the_template(source: str, format: ToolFormat) -> None:
    assert detect_format(ChatTemplate({"default": source})) is format


FORCED = {
    ToolFormat.TAGGED: "<tool_call>\n{}\n</tool_call>",
    ToolFormat.TAGGED_LIST: "<tool_call>[{}]</tool_call>",
    ToolFormat.MISTRAL: "[{}]",
    ToolFormat.LLAMA: "{}",
    ToolFormat.JSON: "[{}]",
}


@pytest.fixture(scope="module")
def grammar_tokenizer(model_folder: Path) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(str(model_folder / "tokenizer.json"))


@pytest.mark.parametrize("format", ToolFormat)
def test_forced_calls_are_what_the_parser_reads(
    format: ToolFormat, grammar_tokenizer: llguidance.LLTokenizer, model_folder: Path
) -> None:
    """The grammar takes a call, no answer in words, no foreign tool, and its language is the parser's."""
    tokenizer = Tokenizer.load(model_folder)

    def accepts(text: str, **choice: Any) -> bool:
        kind, source = forced_tool_grammar(format, TOOLS, **choice)
        grammar = source if kind == "lark" else llguidance.LLMatcher.grammar_from_json_schema(source)
        matcher = llguidance.LLMatcher(grammar_tokenizer, grammar)
        assert not matcher.get_error()
        ids = tokenizer.encode(text)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    add, now = (ADD, NOW) if format is not ToolFormat.LLAMA else (
        ADD.replace("arguments", "parameters"), NOW.replace("arguments", "parameters")
    )  # fmt: skip
    text = FORCED[format].replace("{}", add)
    assert accepts(text) and accepts(text, name="add") and accepts(text, parallel=False)
    assert calls(parse(format, text, [])) == ONE
    assert not accepts(text, name="now")
    assert not accepts("Hello")
    if "tool_call" in text:
        assert not accepts(text.replace(": 1", ":    1")), "room for endless white space"
    assert not accepts(FORCED[format].replace("{}", add.replace("1", '"one"')))
    if format not in (ToolFormat.LLAMA, ToolFormat.TAGGED):
        two = FORCED[format].replace("{}", f"{add}, {now}")
        assert accepts(two) and not accepts(two, parallel=False)
