"""The HTTP a load generator needs and no more: one POST on one connection, the body of the answer line by line.

It shares the machine with the server it measures, so it is plain asyncio streams: no pools, no redirects, no
decompression. Chunked, counted and until-close bodies are understood. Every failure is a `TransferFailed` whose
message is fit for a table of reasons.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from kvarn.errors import KvarnError

_LIMIT = 4 * 1024 * 1024
"""Bytes: the longest line (an SSE event) and the most that waits unread."""
_EARLY = "disconnected mid-stream"


class TransferFailed(Exception):
    """The request did not get its whole answer."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens. `base_url` as OpenAI clients take it: scheme, host, port, maybe a path such as /v1."""

    host: str
    port: int
    secure: bool
    path: str
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @classmethod
    def parse(cls, base_url: str, api_key: str | None = None) -> Endpoint:
        """Split `base_url`; a missing /v1 is added. KvarnError when it is not an http(s) URL."""
        try:
            parts = urlsplit(base_url if "//" in base_url else f"http://{base_url}")
            port = parts.port
        except ValueError as error:
            raise KvarnError(f"base URL is {base_url!r}: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise KvarnError(f"base URL is {base_url!r}; expected something like http://127.0.0.1:8000/v1")
        secure = parts.scheme == "https"
        path = parts.path.rstrip("/") or "/v1"
        headers = (("Authorization", f"Bearer {api_key}"),) if api_key else ()
        return cls(parts.hostname, port or (443 if secure else 80), secure, path, headers)


@dataclass
class Answer:
    """Status and headers (lower-case names) of an answer whose body is still to be read."""

    status: int
    headers: dict[str, str]
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter

    async def lines(self) -> AsyncIterator[bytes]:
        """The body's lines without their line ends, each as soon as it is complete."""
        rest = b""
        async for piece in self._pieces():
            *complete, rest = (rest + piece).split(b"\n") if rest else piece.split(b"\n")
            for line in complete:
                yield line.rstrip(b"\r")
        if rest:
            yield rest

    async def body(self) -> bytes:
        """The whole body."""
        return b"".join([piece async for piece in self._pieces()])

    async def _pieces(self) -> AsyncIterator[bytes]:
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            while size := await self._chunk_size():
                yield (await self._reader.readexactly(size + 2))[:-2]
            return
        left = int(self.headers["content-length"]) if "content-length" in self.headers else None
        while left is None or left > 0:
            piece = await self._reader.read(65536 if left is None else min(left, 65536))
            if not piece:
                if left:
                    raise TransferFailed(_EARLY)
                return
            left = None if left is None else left - len(piece)
            yield piece

    async def _chunk_size(self) -> int:
        line = await self._reader.readline()
        if not line:
            raise TransferFailed(_EARLY)
        return int(line.split(b";")[0], 16)

    def close(self) -> None:
        """Drop the connection, read or not."""
        self._writer.close()


async def get(endpoint: Endpoint, path: str) -> Answer:
    """GET `path` below the endpoint's own path."""
    return await _send(endpoint, "GET", path, b"")


async def post(endpoint: Endpoint, path: str, body: bytes, headers: Sequence[tuple[str, str]] = ()) -> Answer:
    """POST `body` (JSON) to `path` below the endpoint's own path; returns as soon as the headers are in."""
    return await _send(endpoint, "POST", path, body, headers)


async def _send(
    endpoint: Endpoint, method: str, path: str, body: bytes, more: Sequence[tuple[str, str]] = ()
) -> Answer:
    context = ssl.create_default_context() if endpoint.secure else None
    try:
        reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=context, limit=_LIMIT)
    except OSError as error:
        raise TransferFailed(f"cannot connect: {error.strerror or type(error).__name__}") from error
    try:
        headers = [f"{method} {endpoint.path}{path} HTTP/1.1", f"Host: {endpoint.host}:{endpoint.port}"]
        headers += ["Content-Type: application/json", f"Content-Length: {len(body)}", "Connection: close"]
        headers += [f"{name}: {value}" for name, value in (*endpoint.headers, *more)]
        writer.write("\r\n".join([*headers, "", ""]).encode("latin-1") + body)
        await writer.drain()
        return await _read_head(reader, writer)
    except BaseException:
        writer.close()
        raise


async def _read_head(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Answer:
    while True:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, _, rest = lines[0].partition(" ")
        if not version.startswith("HTTP/1"):
            raise TransferFailed(f"not an HTTP server: it says {lines[0][:40]!r}")
        status = int(rest[:3])
        if status >= 200:  # 100 Continue and its kin announce the real one
            break
    pairs = (line.partition(":") for line in lines[1:] if line)
    return Answer(status, {name.strip().lower(): value.strip() for name, _, value in pairs}, reader, writer)
