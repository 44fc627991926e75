"""Messages of a conversation -> the prompt that a model was trained on, through its Jinja chat template.

Templates come from model files, so they run in Jinja's sandbox. Messages are in OpenAI's form. A model whose template
knows nothing of tools gets them described in the system message, and sees calls and results as text.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvarn.errors import ModelError, RequestError
from kvarn.models.config import read_json

Message = dict[str, Any]
_TEXT_PARTS: Final = ("text", "input_text", "output_text")
_TOOLS_PREAMBLE: Final = """You can call functions. These are available, one JSON description a line:
<tools>
{tools}
</tools>
To call functions, answer with nothing but a list of calls in this form:
<tool_call>[{{"name": "function name", "arguments": {{"argument": "value"}}}}]</tool_call>
When no function is needed, answer in plain words. Results of calls come inside <tool_response> tags."""


class ChatTemplate:
    """A model's chat template.

    templates  Jinja sources by name; "default" is the usual one, "tool_use" serves requests with tools where present
    tokens     text of special tokens that templates name, such as bos_token
    """

    def __init__(self, templates: dict[str, str], tokens: dict[str, str] | None = None) -> None:
        environment = _environment()
        self.sources = dict(templates)
        self._tokens = dict(tokens or {})
        self._knows_tools = {name: bool(re.search(r"\btools\b", source)) for name, source in templates.items()}
        try:
            self._compiled = {name: environment.from_string(source) for name, source in templates.items()}
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"the model's chat template is not valid Jinja: {error}") from None

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """The chat template of a model folder; a model without one renders nothing but a RequestError."""
        path = folder / "tokenizer_config.json"
        config = read_json(path) if path.exists() else {}
        tokens = {}
        for name, value in config.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                tokens[name] = text
        return cls(_find_templates(folder, config), tokens)

    @property
    def knows_tools(self) -> bool:
        """Whether the model has a template of its own that describes tools."""
        return any(self._knows_tools.values())

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt for `messages` (OpenAI chat messages) with `tools` (OpenAI tool definitions) on offer.

        Further keyword arguments reach the template (`enable_thinking`, `documents`). Raises RequestError for
        messages that the template refuses or that hold anything but text.
        """
        name = "tool_use" if tools and "tool_use" in self._compiled else "default"
        if name not in self._compiled:
            raise RequestError(
                "this model has no chat template; use /v1/completions with a plain prompt", field="messages"
            )
        try:
            prepared = [_prepared(message, index) for index, message in enumerate(messages)]
            if not self._knows_tools[name]:
                prepared = _tools_as_text(prepared, tools or [])
            variables = {
                **self._tokens,
                **kwargs,
                "messages": prepared,
                "tools": list(tools) if tools else None,
                "add_generation_prompt": add_generation_prompt,
            }
            return self._compiled[name].render(variables)
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refuses these messages: {error}", field="messages") from None
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise RequestError(
                f"the chat template cannot render these messages ({type(error).__name__}: {error})", field="messages"
            ) from None


def _find_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """All templates of a folder: newer models have .jinja files, older ones text or a list in tokenizer_config.json."""
    value = config.get("chat_template")
    templates = {}
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        templates = {item["name"]: item["template"] for item in value}
    legacy = folder / "chat_template.json"
    if legacy.exists():
        templates["default"] = str(read_json(legacy).get("chat_template", ""))
    files = [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    for path in files:
        if path.is_file():
            templates["default" if path.stem == "chat_template" else path.stem] = path.read_text(encoding="utf-8")
    return templates


# ---- messages --------------------------------------------------------------------------------------------


def _prepared(message: Message, index: int) -> Message:
    """A message as templates expect it: content a string, tool-call arguments an object."""
    prepared = {**message, "content": _text(message.get("content"), index)}
    if message.get("tool_calls"):
        prepared["tool_calls"] = [_prepared_call(call) for call in message["tool_calls"]]
    return prepared


def _text(content: Any, index: int) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise RequestError(
                f"messages[{index}] has a content part of type {kind!r}; this model reads text parts only",
                field=f"messages[{index}].content",
            )
        texts.append(part["text"])
    return "".join(texts)


def _prepared_call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # A model wrote it; if it is not JSON, or nested without end, it is shown as it was.
        with contextlib.suppress(ValueError, RecursionError):
            function["arguments"] = json.loads(arguments) if arguments else {}
    return {**call, "function": function}


def _tools_as_text(messages: list[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """Tools in the system message, calls and results as text, for templates that know none of them."""
    plain: list[Message] = []
    for message in messages:
        if message.get("tool_calls"):
            calls = [
                {"name": call["function"].get("name"), "arguments": call["function"].get("arguments")}
                for call in message["tool_calls"]
            ]
            text = f"<tool_call>{json.dumps(calls, ensure_ascii=False)}</tool_call>"
            content = f"{message['content']}\n{text}" if message["content"] else text
            plain.append({"role": message["role"], "content": content})
        elif message.get("role") == "tool":
            text = f"<tool_response>\n{message['content']}\n</tool_response>"
            if plain and plain[-1].get("responses"):  # templates want user and assistant to take turns
                plain[-1]["content"] += "\n" + text
            else:
                plain.append({"role": "user", "content": text, "responses": True})
        else:
            plain.append(message)
    if tools:
        lines = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
        preamble = _TOOLS_PREAMBLE.format(tools=lines)
        if plain and plain[0].get("role") == "system":
            plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{preamble}"}
        else:
            plain.insert(0, {"role": "system", "content": preamble})
    return plain


# ---- Jinja as chat templates expect it -------------------------------------------------------------------


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model wrote, for training; here it is just its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
