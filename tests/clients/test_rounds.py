"""What requests of rounds carry, as a server gets them: from our client, LangChain, a model client as AutoGen's."""

from __future__ import annotations

import asyncio
import threading
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypedDict

import pytest
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from openai import AsyncOpenAI

from kvarn.clients.autogen import SharedChatClient, begin_round
from kvarn.clients.rounds import (
    RoundClient,
    RoundPrompt,
    all_gather,
    new_round,
    round_field,
    round_messages,
    round_segments,
    transcript_messages,
)
from kvarn.errors import KvarnError
from kvarn.serving.rounds.hints import RoundHint

SAID = {"ada": "I was there. ", "bram": "I was not."}
HEARD = [
    {"type": "text", "text": "ada: I was there.\n", "segment": "shared", "segment_id": "ada"},
    {"type": "text", "text": "bram: I was not.\n", "segment": "shared", "segment_id": "bram"},
]


def bodies(server: Any) -> dict[str, dict[str, Any]]:
    """By agent."""
    return {body["round"]["agent"]: body for _, body in server.requests}


def one_round_of(agents: set[str], asked: dict[str, dict[str, Any]]) -> bool:
    hints = [body["round"] for body in asked.values()]
    return set(asked) == agents and len({each["id"] for each in hints}) == 1 and {each["size"] for each in hints} == {2}


def test_a_round_has_an_id_of_its_own() -> None:
    first, second = new_round(["ada", "bram"]), new_round(["ada", "bram"])
    assert {hint.size for hint in first.values()} == {2}
    assert {first["ada"].id} == {first["bram"].id} != {second["ada"].id}
    with pytest.raises(KvarnError, match="every agent once"):
        new_round(["ada", "ada"])


def test_what_was_said_is_the_same_part_for_everybody() -> None:
    ada, bram = (round_messages(f"You are {name}.", SAID, f"Speak, {name}.") for name in ("Ada", "Bram"))
    assert ada[0] == {"role": "system", "content": "You are Ada."}
    assert ada[1]["content"] == [*HEARD, {"type": "text", "text": "Speak, Ada."}]
    assert ada[1]["content"][:2] == bram[1]["content"][:2]
    assert [message["role"] for message in round_messages("", SAID, "Speak.")] == ["user"]


def test_segments_are_texts_with_their_speakers_or_tokens_as_they_are() -> None:
    assert round_segments("You are Ada.", {"bram": " No. ", "cleo": (4, 5)}, [7]) == [
        {"kind": "private", "content": "You are Ada."},
        {"kind": "shared", "content": "\nbram: No.", "id": "bram"},
        {"kind": "shared", "content": [4, 5], "id": "cleo"},
        {"kind": "task", "content": [7]},
    ]


def test_a_group_chat_is_the_others_words_marked_and_ones_own_as_the_assistants() -> None:
    transcript = [("user", "Begin."), ("ada", "Yes."), ("bram", "No."), ("cleo", "Why?")]
    messages = transcript_messages("You are Bram.", transcript, "bram", "Your turn.")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert [part["segment_id"] for part in messages[1]["content"]] == ["user", "ada"]
    assert messages[2]["content"] == "No."
    assert [part.get("segment") for part in messages[3]["content"]] == ["shared", None]


def test_a_round_of_completions_is_sent_at_once(server: Any) -> None:
    server.together = threading.Barrier(2)  # or nobody is answered

    async def run() -> dict[str, Any]:
        prompts = {name: RoundPrompt(f"You are {name}.", SAID, "Speak.") for name in ("ada", "bram")}
        async with RoundClient(server.base_url, "m", api_key="secret") as client:
            return await client.complete(prompts, max_tokens=4)

    answers = asyncio.run(run())
    assert {(each.text, *each.token_ids) for each in answers.values()} == {("It is done.", 5, 6)}
    assert answers["ada"].prompt_tokens == 9
    assert (answers["ada"].cached_tokens, answers["ada"].reused_tokens) == (2, 3)
    asked = bodies(server)
    assert one_round_of({"ada", "bram"}, asked)
    assert asked["ada"]["segments"] == round_segments("You are ada.", SAID, "Speak.")
    assert (asked["bram"]["max_tokens"], asked["bram"]["return_token_ids"]) == (4, True)
    assert server.requests[0][0]["authorization"] == "Bearer secret"


def test_a_round_of_chats_is_sent_at_once(server: Any) -> None:
    server.together = threading.Barrier(2)

    async def run() -> dict[str, Any]:
        messages = {name: round_messages("", SAID, f"Speak, {name}.") for name in ("ada", "bram")}
        async with RoundClient(server.base_url, "m") as client:
            return await client.chat(messages, temperature=0)

    assert asyncio.run(run())["bram"].text == "It is done."
    asked = bodies(server)
    assert one_round_of({"ada", "bram"}, asked)
    assert asked["bram"]["messages"][0]["content"][:2] == HEARD


def test_who_fails_is_named_with_the_servers_words(server: Any) -> None:
    async def run(url: str) -> None:
        async with RoundClient(url, "none") as client:
            await client.complete({"ada": RoundPrompt("", {}, "Speak.")})

    with pytest.raises(KvarnError, match=r"agent 'ada': .* answered 404: .*no such model"):
        asyncio.run(run(server.base_url))
    with pytest.raises(KvarnError, match=r"agent 'ada': .*is .* running"):
        asyncio.run(run("http://127.0.0.1:9/v1"))


def test_a_step_of_a_langgraph_asks_all_and_gathers_what_they_say(server: Any) -> None:
    server.together = threading.Barrier(2)
    model = ChatOpenAI(base_url=server.base_url, api_key="none", model="m", max_retries=0)  # type: ignore[arg-type]

    class Talk(TypedDict):
        said: dict[str, str]

    async def speak(state: Talk, hint: RoundHint) -> str:
        messages = round_messages(f"You are {hint.agent}.", state["said"], "Speak.")
        return f"{hint.agent}: {(await model.ainvoke(messages, extra_body=round_field(hint))).content}"

    graph = StateGraph(Talk)
    graph.add_node("round", all_gather({"ada": speak, "bram": speak}, name="talk"))
    graph.add_edge(START, "round")
    graph.add_edge("round", END)
    state = asyncio.run(graph.compile().ainvoke({"said": SAID}))
    assert state == {"said": {name: f"{name}: It is done." for name in ("ada", "bram")}}
    asked = bodies(server)
    assert one_round_of({"ada", "bram"}, asked)
    for name, body in asked.items():
        assert body["round"]["id"].startswith("talk-")
        assert body["messages"][0]["content"] == f"You are {name}."
        assert body["messages"][1]["content"] == [*HEARD, {"type": "text", "text": "Speak."}]


class ModelClient:
    """A model client by AutoGen's protocol: `extra_create_args` become arguments of OpenAI's client."""

    def __init__(self, url: str) -> None:
        self.model_info = {"family": "unknown"}
        self._client = AsyncOpenAI(base_url=url, api_key="none", max_retries=0)

    async def create(
        self, messages: Any, *, tools: Any = (), extra_create_args: Any = MappingProxyType({})
    ) -> str | None:
        plain = [{"role": "user", "content": message.content} for message in messages]
        answer = await self._client.chat.completions.create(model="m", messages=plain, **extra_create_args)  # type: ignore[arg-type]
        return answer.choices[0].message.content

    async def create_stream(
        self, messages: Any, *, tools: Any = (), extra_create_args: Any = MappingProxyType({})
    ) -> Any:
        yield await self.create(messages, extra_create_args=extra_create_args)


def message(type: str, content: Any, source: str = "") -> Any:
    return SimpleNamespace(type=type, content=content, source=source)


CHAT = [
    message("SystemMessage", "You are Ada."),
    message("UserMessage", "Begin.", "user"),
    message("AssistantMessage", "Yes.", "ada"),
    message("UserMessage", "No.", "bram"),
]
MARKED = [
    {"role": "system", "content": "You are Ada."},
    {"role": "user", "content": "Begin.", "name": "user", "segment": "shared", "segment_id": "user"},
    {"role": "assistant", "content": "Yes.", "name": "ada"},
    {"role": "user", "content": "No.", "name": "bram", "segment": "shared", "segment_id": "bram"},
]


def test_a_model_client_of_autogen_marks_what_others_said(server: Any) -> None:
    async def run() -> None:
        client = SharedChatClient(ModelClient(server.base_url))
        assert client.model_info == {"family": "unknown"}
        extra = {"temperature": 0.5, "extra_body": {"priority": 3}}
        assert await client.create(CHAT, tools=[], extra_create_args=extra) == "It is done."
        assert [each async for each in client.create_stream(CHAT)] == ["It is done."]

    asyncio.run(run())
    first, second = (body for _, body in server.requests)
    assert first["messages"] == second["messages"] == MARKED
    assert (first["temperature"], first["priority"]) == (0.5, 3)
    assert "round" not in first


def test_what_is_more_than_text_goes_as_autogen_has_it(server: Any) -> None:
    pictures = [*CHAT, message("UserMessage", ["a picture"], "bram")]
    calls = [*CHAT, message("FunctionExecutionResultMessage", [])]

    async def run() -> None:
        client = SharedChatClient(ModelClient(server.base_url))
        for chat in (pictures, calls):
            await client.create(chat)

    asyncio.run(run())
    for (_, body), chat in zip(server.requests, (pictures, calls), strict=True):
        assert body["messages"] == [{"role": "user", "content": each.content} for each in chat]


def test_agents_of_autogen_join_a_round_for_one_request(server: Any) -> None:
    server.together = threading.Barrier(2)

    async def run() -> None:
        clients = {name: SharedChatClient(ModelClient(server.base_url)) for name in ("ada", "bram")}
        begin_round(clients)
        await asyncio.gather(*(client.create(CHAT) for client in clients.values()))
        assert one_round_of({"ada", "bram"}, bodies(server))
        server.requests.clear()
        await asyncio.gather(*(client.create(CHAT) for client in clients.values()))

    asyncio.run(run())
    assert not any("round" in body for _, body in server.requests)
