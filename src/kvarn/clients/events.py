"""Tells a server how an application's tool calls go, and what its requests are part of.

In go `kvarn.serving.agents.events` and `AgentHints`; out go `POST {base_url}/agents/events` and arguments of a request.
An application must never fail because of advice: what the server refuses, and a server that is not there, is logged
once as a warning (then at debug level) and otherwise ignored.
"""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Any, TypedDict

import httpx
import msgspec

from kvarn.errors import KvarnError
from kvarn.serving.agents.events import AgentEvent
from kvarn.serving.agents.hints import AgentHints

log = logging.getLogger("kvarn.clients")

TIMEOUT_SECONDS = 5.0
"""An event is answered at once; a server that takes longer is in trouble, and the tool should run."""


class Extras(TypedDict):
    """Arguments that carry hints, as OpenAI's client and what is built on it name them."""

    extra_headers: dict[str, str]
    extra_body: dict[str, Any]


def request_extras(hints: AgentHints) -> Extras:
    """`client.chat.completions.create(..., **request_extras(hints))`."""
    agent = msgspec.to_builtins(hints, str_keys=True)
    return {
        "extra_headers": {"x-session-id": hints.program} if hints.program else {},
        "extra_body": {"kv_hints": {"protocol_version": 1, "agent": agent}},
    }


def event_body(event: AgentEvent) -> dict[str, Any]:
    """The event as JSON. The tenant is left out: the server knows it by the API key."""
    fields = msgspec.structs.fields(event)
    said = {f.name: getattr(event, f.name) for f in fields if getattr(event, f.name) != f.default}
    said.pop("tenant", None)
    return {"type": event.__struct_config__.tag, **said}


class AgentEvents:
    """Sends events, and waits for the answer of each; may be shared by threads.

    `base_url` is that of the OpenAI client, such as `http://127.0.0.1:8000/v1`.
    """

    def __init__(self, base_url: str, *, api_key: str = "", timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._url = _url(base_url)
        self._client = httpx.Client(timeout=timeout_seconds, headers=_headers(api_key))
        self._complaints = _Complaints()

    def send(self, event: AgentEvent) -> bool:
        """Whether the server has taken it."""
        try:
            answer = self._client.post(self._url, json=event_body(event))
        except httpx.HTTPError as error:
            return self._complaints.unreachable(self._url, error)
        return self._complaints.judge(event, answer)

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> AgentEvents:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncAgentEvents:
    """The same for asyncio."""

    def __init__(self, base_url: str, *, api_key: str = "", timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._url = _url(base_url)
        self._client = httpx.AsyncClient(timeout=timeout_seconds, headers=_headers(api_key))
        self._complaints = _Complaints()

    async def send(self, event: AgentEvent) -> bool:
        """Whether the server has taken it."""
        try:
            answer = await self._client.post(self._url, json=event_body(event))
        except httpx.HTTPError as error:
            return self._complaints.unreachable(self._url, error)
        return self._complaints.judge(event, answer)

    async def close(self) -> None:
        await self._client.aclose()

    async def __aenter__(self) -> AsyncAgentEvents:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Complaints:
    """Each kind of trouble is a warning once."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._lock = threading.Lock()

    def judge(self, event: AgentEvent, answer: httpx.Response) -> bool:
        if answer.is_success:
            return True
        self._tell(
            str(answer.status_code),
            f"{answer.url} answered {answer.status_code} to {event_body(event)}: {answer.text[:300]}",
        )
        return False

    def unreachable(self, url: str, error: httpx.HTTPError) -> bool:
        self._tell(type(error).__name__, f"{url} cannot be told of tool calls: {type(error).__name__}: {error}")
        return False

    def _tell(self, kind: str, message: str) -> None:
        with self._lock:
            first = kind not in self._told
            self._told.add(kind)
        log.log(logging.WARNING if first else logging.DEBUG, "%s", message)


def _headers(api_key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _url(base_url: str) -> str:
    """Refused here and not at the first event, when the application runs."""
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise KvarnError(f"base_url is {base_url!r}: {error}; expected one like http://127.0.0.1:8000/v1") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise KvarnError(f"base_url is {base_url!r}; expected one like http://127.0.0.1:8000/v1")
    return f"{base_url.rstrip('/')}/agents/events"
