"""AutoGen: a model client for agents of a group chat, which marks what the others said as shared.

In a group chat every agent reads what every other said, behind its own instructions. `SharedChatClient` stands around
an agent's `OpenAIChatCompletionClient`: messages that have a source are marked, and where a round is under way, the
request says so. It goes by the protocol `autogen_core.models.ChatCompletionClient` and imports nothing of AutoGen.

    model = OpenAIChatCompletionClient(model="smollm2", base_url="http://127.0.0.1:8000/v1", ...)
    ada = AssistantAgent("ada", model_client=SharedChatClient(model), system_message=...)

Source: AutoGen's `create(messages, *, tools, ..., extra_create_args)`, whose arguments go to OpenAI's client; that
puts the fields of `extra_body` over a request's own.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from kvarn.clients.rounds import Message, new_round, round_field
from kvarn.serving.rounds.hints import RoundHint

_ROLES = {"SystemMessage": "system", "UserMessage": "user", "AssistantMessage": "assistant"}


class SharedChatClient:
    """Around a model client whose requests go to a kvarn server; everything else is the inner client's.

    A conversation with tool calls or pictures is sent as the inner client has it, without marks.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._hint: RoundHint | None = None

    def join(self, hint: RoundHint) -> None:
        """The next request, and no other, is of this round: see `begin_round`."""
        self._hint = hint

    async def create(self, messages: Sequence[Any], *, extra_create_args: Mapping[str, Any] = {}, **rest: Any) -> Any:
        """As the inner client's."""
        extra = self._extra(messages, extra_create_args)
        return await self._client.create(messages, extra_create_args=extra, **rest)

    async def create_stream(
        self, messages: Sequence[Any], *, extra_create_args: Mapping[str, Any] = {}, **rest: Any
    ) -> AsyncGenerator[Any, None]:
        """As the inner client's."""
        extra = self._extra(messages, extra_create_args)
        async for each in self._client.create_stream(messages, extra_create_args=extra, **rest):
            yield each

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def _extra(self, messages: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
        body: dict[str, Any] = dict(given.get("extra_body") or {})
        marked = [_marked(message) for message in messages]
        if all(message is not None for message in marked):
            body["messages"] = marked
        if self._hint is not None:
            body |= round_field(self._hint)
            self._hint = None
        return {**given, "extra_body": body} if body else dict(given)


def begin_round(clients: Mapping[str, SharedChatClient]) -> None:
    """The next request of each client, by agent, is of one round; send them all at once (`asyncio.gather`).

    Not for teams whose agents speak in turn: nobody's request comes while another's is waited for.
    """
    for agent, hint in new_round(clients).items():
        clients[agent].join(hint)


def _marked(message: Any) -> Message | None:
    """AutoGen's message as OpenAI's, marked if somebody else said it; None for one that is more than text."""
    role, content = _ROLES.get(getattr(message, "type", "")), message.content
    if role is None or not isinstance(content, str):
        return None
    plain: Message = {"role": role, "content": content}
    if role == "system":
        return plain
    plain["name"] = message.source
    return plain | ({"segment": "shared", "segment_id": message.source} if role == "user" else {})
