"""A server on loopback that answers completions by rote and records what it is asked, and told of tool calls."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class RecordingServer(ThreadingHTTPServer):
    """A chat completion calls each tool it has once, then, told the results, ends. Ids count: chat-1, chat-2, ..."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"
        self.events: list[dict[str, Any]] = []
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        """Headers, by lower-case name, and bodies of completions."""
        self.event_status = 200
        self.together = threading.Barrier(1)
        """Completions are answered when so many are there."""

    def answer(self, headers: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:
        self.requests.append((headers, body))
        number = len(self.requests)
        self.together.wait(20)
        usage = {
            "prompt_tokens": 9,
            "completion_tokens": 1,
            "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 2, "reused_tokens": 3},
        }
        if "segments" in body:
            choice = {"index": 0, "text": "It is done.", "token_ids": [5, 6], "finish_reason": "stop"}
            return {"id": f"text-{number}", "object": "text_completion", "choices": [choice], "usage": usage}
        message: dict[str, Any] = {"role": "assistant", "content": "It is done."}
        if body.get("tools") and body["messages"][-1]["role"] != "tool":
            names = [tool["function"]["name"] for tool in body.get("tools", ())]
            calls = [
                {
                    "id": f"call-{number}-{i}",
                    "type": "function",
                    "function": {"name": name, "arguments": '{"what": "x"}'},
                }
                for i, name in enumerate(names)
            ]
            message = {"role": "assistant", "content": None, "tool_calls": calls}
        return {
            "id": f"chat-{number}",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
            "usage": usage,
        }


class _Handler(BaseHTTPRequestHandler):
    server: RecordingServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        if self.path == "/v1/agents/events":
            self.server.events.append(body | ({"key": headers["authorization"]} if "authorization" in headers else {}))
            self._send(self.server.event_status, {"object": "agent.call"})
            return
        if body["model"] == "none":
            self._send(404, {"error": {"message": "there is no such model"}})
            return
        answer = self.server.answer(headers, body)
        if body.get("stream"):
            self._send(200, _chunks(answer), "text/event-stream")
        else:
            self._send(200, answer)

    def _send(self, status: int, answer: dict[str, Any] | str, content_type: str = "application/json") -> None:
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests are quiet."""


def _chunks(answer: dict[str, Any]) -> str:
    """The answer as a stream of one piece."""
    [choice] = answer["choices"]
    delta = dict(choice["message"])
    delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(delta.get("tool_calls", ()))]
    piece = {
        **answer,
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
    }
    end = {**piece, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    return "".join(f"data: {data}\n\n" for data in (json.dumps(piece), json.dumps(end), "[DONE]"))


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    with RecordingServer() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()
