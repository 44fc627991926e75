"""`kvarn chat`: talk to a running server in the terminal."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.markup import escape

from kvarn.errors import KvarnError

_HELP = "/clear forgets the conversation, /system TEXT sets the system message, /exit leaves; Ctrl-C stops an answer."


@dataclass
class Conversation:
    """Messages so far, the system message first."""

    messages: list[dict[str, str]] = field(default_factory=list)

    def set_system(self, text: str) -> None:
        self.clear()
        self.messages = [{"role": "system", "content": text}, *self.messages] if text else self.messages

    def clear(self) -> None:
        self.messages = [m for m in self.messages if m["role"] == "system"][:1]

    def add(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})


def chat(
    base_url: Annotated[str, typer.Option(help="The server to talk to.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model to ask for; default: the first that is served.")
    ] = "",
    api_key: Annotated[str, typer.Option(envvar="KVARN_API_KEY", help="API key, if the server wants one.")] = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    temperature: Annotated[float, typer.Option(help="0 is deterministic.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 1024,
    once: Annotated[str, typer.Option(help="Ask this one question and leave.")] = "",
) -> None:
    """Chat with a running server; shows how fast the answer came."""
    console = Console(highlight=False)
    with _client(base_url, api_key) as client:
        model = model or _first_model(client)
        conversation = Conversation()
        conversation.set_system(system)
        settings = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        if once:
            _answer(console, client, conversation, once, settings)
            return
        console.print(f"[bold]{model}[/] [dim]at {base_url}. {_HELP}[/]")
        for text in _inputs(console):
            match text.split(maxsplit=1):
                case ["/exit" | "/quit"]:
                    return
                case ["/clear"]:
                    conversation.clear()
                case ["/system", *rest]:
                    conversation.set_system(" ".join(rest))
                case [command, *_] if command.startswith("/"):
                    console.print(f"[dim]{_HELP}[/]")
                case [_, *_]:
                    try:
                        _answer(console, client, conversation, text, settings)
                    except KvarnError as error:  # too long, too busy: the conversation so far is still good
                        conversation.messages.pop()
                        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)


def _client(base_url: str, api_key: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        return httpx.Client(base_url=base_url.rstrip("/") + "/", headers=headers, timeout=httpx.Timeout(10, read=600))
    except httpx.InvalidURL as error:
        raise KvarnError(
            f"--base-url is {base_url!r} ({error}); expected something like http://127.0.0.1:8000/v1"
        ) from error


def _inputs(console: Console) -> Iterator[str]:
    """Lines the person types, until end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  line editing and history for input()
    while True:
        try:
            yield console.input("[bold cyan]> [/]")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return


def _answer(
    console: Console, client: httpx.Client, conversation: Conversation, question: str, settings: dict[str, Any]
) -> None:
    """Stream one answer and remember it; an interrupted one is remembered as far as it came."""
    conversation.add("user", question)
    started = time.monotonic()
    first: float | None = None
    pieces: list[str] = []
    usage: dict[str, Any] = {}
    try:
        for chunk in _stream(client, conversation.messages, settings):
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", []):
                text = choice["delta"].get("content") or ""
                if text and first is None:
                    first = time.monotonic()
                pieces.append(text)
                console.print(text, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/]", end="")
    console.print()
    conversation.add("assistant", "".join(pieces))
    if first is not None:
        console.print(f"[dim]{_speed(started, first, time.monotonic(), usage)}[/]")


def _speed(started: float, first: float, ended: float, usage: dict[str, Any]) -> str:
    tokens = usage.get("completion_tokens")
    if not tokens:
        return f"first token after {first - started:.2f} s"
    rate = (tokens - 1) / (ended - first) if tokens > 1 and ended > first else 0.0
    return f"{tokens} tokens, {rate:.1f} tokens/s, first after {first - started:.2f} s"


def _stream(client: httpx.Client, messages: list[dict[str, str]], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    body = {"messages": messages, "stream": True, "stream_options": {"include_usage": True}, **settings}
    try:
        with client.stream("POST", "chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                raise KvarnError(_reason(response))
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise KvarnError(f"the server ended the answer: {chunk['error'].get('message')}")
                    yield chunk
    except httpx.HTTPError as error:
        raise KvarnError(f"the connection to {client.base_url} broke: {error}") from error


def _first_model(client: httpx.Client) -> str:
    try:
        response = client.get("models")
    except httpx.HTTPError as error:
        raise KvarnError(
            f"no server answers at {client.base_url} ({error}): run `kvarn serve`, or name one with --base-url"
        ) from error
    if response.is_error:
        raise KvarnError(_reason(response))
    try:
        name: str = response.json()["data"][0]["id"]
    except (ValueError, LookupError, TypeError) as error:
        raise KvarnError(
            f"{client.base_url} lists no model; is it an OpenAI server, and does the URL end in /v1?"
        ) from error
    return name


def _reason(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    return f"the server answered {response.status_code}: {message}"
