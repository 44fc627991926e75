"""A small OpenAI-style server on real sockets whose answers are scripted by the model's name."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any, Self


def event(text: str | None, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}]}


class OpenAIServer:
    """Runs in a thread of its own; `bodies` are the requests it got, `most` the most it had at once."""

    def __init__(self, *, wait_for: int = 1) -> None:
        """`wait_for`: answer no request before so many are in flight."""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.in_flight = self.most = 0
        self._wait_for = wait_for

    def __enter__(self) -> Self:
        started = threading.Event()
        self._loop = asyncio.new_event_loop()

        async def start() -> None:
            self._barrier = asyncio.Barrier(self._wait_for)
            server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            started.set()

        self._loop.create_task(start())
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.headers.append(head)
        if head.startswith("GET"):
            document = json.dumps({"data": [{"id": "tokens"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(document), document))
        else:
            path = head.split(" ")[1]
            length = int(next(line for line in head.split("\r\n") if line.startswith("Content-Length")).split(":")[1])
            body = json.loads(await reader.readexactly(length))
            if not path.endswith("/completions"):
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
                writer.close()
                return
            self.bodies.append(body)
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)
            await self._barrier.wait()
            known = "segments" not in body or body["model"] == "parts"
            await (getattr(self, "_" + body["model"]) if known else self._unknown)(body, writer)
            self.in_flight -= 1
        await writer.drain()
        writer.close()

    async def _tokens(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """An event a token, in HTTP chunks that cut events in two; usage last."""
        events = [event(" word") for _ in range(body["max_tokens"])]
        usage = {"completion_tokens": len(events), "prompt_tokens": len(body["prompt"])}
        lines = "".join(
            f"data: {json.dumps(one)}\n\n" for one in [*events, event("", "length"), {"choices": [], "usage": usage}]
        )
        data = f": comment\r\n\r\n{lines}data: [DONE]\n\n".encode()
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n")
        for start in range(0, len(data), 57):
            piece = data[start : start + 57]
            writer.write(b"%x;note=1\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    async def _ids(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """Says which tokens it made, two at a time where it can; fails who wants 77 of them."""
        if body["max_tokens"] == 77:
            await self._broken(body, writer)
            return
        ids = [1 + len(body["prompt"]) + place for place in range(body["max_tokens"])]
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for start in range(0, len(ids), 2):
            choice = {"index": 0, "text": "", "token_ids": ids[start : start + 2], "finish_reason": None}
            writer.write(f"data: {json.dumps({'id': 'cmpl-1', 'choices': [choice]})}\n\n".encode())
        details = {"cached_tokens": len(body["prompt"]) // 2}
        if "segments" in body:
            shared = sum(len(part["content"]) for part in body["segments"] if part["kind"] == "shared")
            details = {"cached_tokens": shared + 3, "reused_tokens": shared}
        usage = {"completion_tokens": len(ids), "prompt_tokens": len(body["prompt"]), "prompt_tokens_details": details}
        writer.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())

    async def _parts(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """The same, and takes the parts of a prompt."""
        whole = [token for part in body.get("segments", ()) for token in part["content"]]
        await self._ids({"prompt": whole} | body, writer)

    async def _brief(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """Three tokens at most, the last of which, 0, is an end, and no text."""
        ids = [7, 8, 0][: body["max_tokens"]]
        choice = {"index": 0, "text": "", "token_ids": ids, "finish_reason": "length" if ids[-1] else "stop"}
        usage = {"completion_tokens": len(ids), "prompt_tokens": len(body["prompt"])}
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for piece in ({"choices": [choice]}, {"choices": [], "usage": usage}):
            writer.write(f"data: {json.dumps(piece)}\n\n".encode())
        writer.write(b"data: [DONE]\n\n")

    async def _unknown(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        error = b'{"error": {"message": "prompt: Field required", "type": "invalid_request"}}'
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(error), error))

    async def _joined(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """Half as many events as tokens, a body that ends with the connection, chat form."""
        role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
        words = [{"choices": [{"delta": {"content": " two words"}}]} for _ in range(body["max_tokens"] // 2)]
        usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"], "prompt_tokens": 9}}
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for one in (role, *words, usage):
            writer.write(f"data: {json.dumps(one)}\n\n".encode())
        writer.write(b"data: [DONE]\n\n")

    async def _busy(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        error = b'{"error": {"message": "too many requests", "type": "rate_limit"}}'
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: %d\r\n\r\n%s" % (len(error), error))

    async def _broken(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 4\r\n\r\noops")

    async def _cut(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        data = f"data: {json.dumps(event(' word'))}\n\n".encode()
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))

    async def _sick(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.1 200 OK\r\n\r\ndata: {"error": {"message": "out of memory"}}\n\n')

    async def _junk(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\ndata: {not json\n\n")

    async def _shapeless(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices": ["hello"]}\n\n')

    async def _nonsense(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-x\r\n\r\n")

    async def _silent(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()
