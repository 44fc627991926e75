"""Tells a server which parts of a prompt many agents share, and which requests are of one round.

Agents that work in rounds get the same texts, what everybody said in the last round, behind different histories. In go
a private history, those texts and a task; out go `segments` (plain completions), marked messages (chat) and the field
`round`. A shared text is made into tokens on its own, so it must be the same string for all: who said it is part of it.

    hints = new_round(["ada", "bram"])
    fields = {"messages": round_messages(history, said, task), **round_field(hints["ada"])}

`RoundClient` does that and sends a round's requests at once; `all_gather` makes one of its steps a node of a graph.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar
from uuid import uuid4

import httpx
import msgspec

from kvarn.errors import KvarnError
from kvarn.serving.rounds.hints import RoundHint

Content = str | Sequence[int]
"""Text, or token ids for plain completions."""
Message = dict[str, Any]
State = TypeVar("State")


# ---- what requests carry ---------------------------------------------------------------------------------


def new_round(agents: Iterable[str], name: str = "round") -> dict[str, RoundHint]:
    """Hints for the agents of one round, under an id that no other has. KvarnError when one is named twice."""
    names = list(agents)
    if len(set(names)) < len(names):
        raise KvarnError(f"a round of {names}; expected every agent once")
    id = f"{name}-{uuid4().hex[:12]}"
    return {agent: RoundHint(id, len(names), agent) for agent in names}


def round_field(hint: RoundHint) -> dict[str, Any]:
    """The field of a request's JSON: OpenAI's client takes it as `extra_body=round_field(hint)`."""
    return {"round": msgspec.to_builtins(hint)}


def shared_part(speaker: str, text: str) -> dict[str, str]:
    """What somebody said, as a part of a message's content that others get as well."""
    return {"type": "text", "text": f"{_line(speaker, text)}\n", "segment": "shared", "segment_id": speaker}


def round_messages(history: str, said: Mapping[str, str], task: str) -> list[Message]:
    """Chat messages of one agent: its history as the system's, then what was said (speaker -> text) and its task.

    All that was said is one user message, since many chat templates want users and assistants to take turns.
    """
    parts = [shared_part(speaker, text) for speaker, text in said.items()]
    messages: list[Message] = [{"role": "system", "content": history}] if history else []
    return [*messages, {"role": "user", "content": [*parts, {"type": "text", "text": task}]}]


def transcript_messages(history: str, transcript: Sequence[tuple[str, str]], me: str, task: str) -> list[Message]:
    """Chat messages of one who takes part in a group chat: `transcript` is (speaker, text) from the beginning.

    Its own words are the assistant's; what the others said in between is one user message of shared parts.
    """
    messages: list[Message] = [{"role": "system", "content": history}] if history else []
    heard: list[dict[str, str]] = []
    for speaker, text in transcript:
        if speaker == me:
            messages += [{"role": "user", "content": heard}] if heard else []
            messages.append({"role": "assistant", "content": text})
            heard = []
        else:
            heard.append(shared_part(speaker, text))
    return [*messages, {"role": "user", "content": [*heard, {"type": "text", "text": task}]}]


def round_segments(history: Content, said: Mapping[str, Content], task: Content) -> list[dict[str, Any]]:
    """`segments` of a plain completion, in place of `prompt`. Token ids are taken as they are, without a speaker."""
    shared = [
        {
            "kind": "shared",
            "content": f"\n{_line(speaker, content)}" if isinstance(content, str) else list(content),
            "id": speaker,
        }
        for speaker, content in said.items()
    ]
    ends = [{"kind": kind, "content": _plain(content)} for kind, content in (("private", history), ("task", task))]
    return [ends[0], *shared, ends[1]]


def _line(speaker: str, text: str) -> str:
    return f"{speaker}: {text.strip()}"


def _plain(content: Content) -> str | list[int]:
    return content if isinstance(content, str) else list(content)


# ---- a round at once -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoundPrompt:
    """What one agent is asked."""

    history: Content
    """Its own: who it is and what it remembers."""
    said: Mapping[str, Content]
    """Speaker -> words of the last round, in the order in which this agent reads them."""
    task: Content


@dataclass(frozen=True)
class RoundAnswer:
    """What it said, and what of its prompt was there."""

    text: str
    token_ids: list[int]
    """Of plain completions: to be said on as they are."""
    prompt_tokens: int
    cached_tokens: int
    """Of these, what was there and not computed."""
    reused_tokens: int
    """Of these, what was taken from shared segments."""


class RoundClient:
    """Asks all agents of a round at once. `base_url` as OpenAI's client takes it; the server must be kvarn's.

    `fields` of its methods are further fields of each request, such as `temperature`. KvarnError, with the agent and
    the server's words, for a request that fails; the others of its round are then given up.
    """

    def __init__(self, base_url: str, model: str, *, api_key: str = "", timeout_seconds: float = 600.0) -> None:
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # A round's requests must all be under way, or the server waits in vain for the rest.
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(timeout=timeout_seconds, headers=headers, limits=limits)
        self._url = base_url.rstrip("/")
        self._model = model

    async def complete(self, prompts: Mapping[str, RoundPrompt], **fields: Any) -> dict[str, RoundAnswer]:
        """One round of plain completions: agent -> its answer."""
        bodies = {
            agent: {"segments": round_segments(prompt.history, prompt.said, prompt.task), "return_token_ids": True}
            for agent, prompt in prompts.items()
        }
        return await self._round("/completions", bodies, fields)

    async def chat(self, messages: Mapping[str, Sequence[Message]], **fields: Any) -> dict[str, RoundAnswer]:
        """One round of chat completions: agent -> messages in, agent -> its answer out."""
        bodies = {agent: {"messages": list(each)} for agent, each in messages.items()}
        return await self._round("/chat/completions", bodies, fields)

    async def _round(
        self, path: str, bodies: Mapping[str, dict[str, Any]], fields: dict[str, Any]
    ) -> dict[str, RoundAnswer]:
        hints = new_round(bodies)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    agent: group.create_task(
                        self._ask(path, agent, {"model": self._model} | body | round_field(hints[agent]) | fields)
                    )
                    for agent, body in bodies.items()
                }
        except* KvarnError as failures:
            raise failures.exceptions[0] from None
        return {agent: task.result() for agent, task in tasks.items()}

    async def _ask(self, path: str, agent: str, body: dict[str, Any]) -> RoundAnswer:
        try:
            reply = await self._client.post(self._url + path, json=body)
        except httpx.HTTPError as error:
            raise KvarnError(f"agent {agent!r}: {type(error).__name__}: {error}; is {self._url} running?") from error
        if not reply.is_success:
            raise KvarnError(f"agent {agent!r}: {self._url}{path} answered {reply.status_code}: {reply.text[:300]}")
        answer = reply.json()
        [choice], usage = answer["choices"], answer["usage"]
        details = usage.get("prompt_tokens_details") or {}
        return RoundAnswer(
            choice["text"] if "text" in choice else choice["message"]["content"] or "",
            choice.get("token_ids") or [],
            usage["prompt_tokens"],
            details.get("cached_tokens") or 0,
            details.get("reused_tokens") or 0,
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def __aenter__(self) -> RoundClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def all_gather(
    agents: Mapping[str, Callable[[State, RoundHint], Awaitable[str]]], *, name: str = "round", key: str = "said"
) -> Callable[[State], Awaitable[dict[str, dict[str, str]]]]:
    """A step in which all agents speak at once: a node for LangGraph, or an async function of any state.

    Each agent gets the state and its hint, and answers with what it says. The step gives `{key: {agent: words}}`, which
    in a state is what the agents read in the next round. An agent that fails fails the step; the others are cancelled.
    """

    async def step(state: State) -> dict[str, dict[str, str]]:
        hints = new_round(agents, name)
        asked = [agent(state, hints[who]) for who, agent in agents.items()]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_awaited(each)) for each in asked]
        return {key: {who: task.result() for who, task in zip(agents, tasks, strict=True)}}

    return step


async def _awaited(said: Awaitable[str]) -> str:
    return await said
