"""/v1/chat/completions: the answer to a conversation, with tools, JSON schemas and log-probabilities."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kvarn.serving.api.bodies import read_body
from kvarn.serving.api.generation import Delta, Generation, new_id
from kvarn.serving.api.logprobs import chat_logprobs
from kvarn.serving.api.schemas import ChatRequest, answered_calls, messages_json
from kvarn.serving.api.service import Service, abort_when_gone, output_limit
from kvarn.serving.api.sse import EventStream, chunk_template, last_chunk
from kvarn.serving.api.tools import AnswerParser, CallPiece, TextPiece, ToolPlan
from kvarn.serving.api.translate import ask_of, grammar_of, sampling_params

_json = msgspec.json.Encoder()


class ChatCompletions:
    """The endpoint; `create` is its handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        arrival = time.monotonic()
        service = self._service
        tenant = service.tenant(request)
        body = await read_body(request, ChatRequest, service.config.max_body_bytes)
        service.check_model(body.model)
        link, ready = await service.engine()
        plan = ToolPlan.of_chat(body)
        prompt = await service.text.encode_chat(
            messages_json(body.messages), plan.offered, body.chat_template_kwargs or {}
        )
        field, asked = ("max_completion_tokens", body.max_completion_tokens)
        if asked is None:
            field, asked = "max_tokens", body.max_tokens
        max_tokens = output_limit(
            len(prompt.tokens),
            asked,
            service.config.default_max_tokens,
            ready.max_context,
            field=field,
            prompt_field="messages",
        )
        logprobs = (body.top_logprobs or 0) if body.logprobs else -1
        grammar = plan.grammar(service.text) or grammar_of(body.response_format)
        params = sampling_params(body, max_tokens=max_tokens, logprobs=logprobs, grammar=grammar)
        rate = service.stream_rate(request, body.stream_rate, tenant)
        ask = replace(
            ask_of(body, "chat.completions", [prompt], params, tenant, rate, service.hints(request, body)),
            tools=bool(plan.offered),
            continues=service.calls.request_of(tenant, answered_calls(body.messages)),
        )
        generation = service.generate(new_id("chatcmpl-"), ask, link, arrival, streams=bool(body.stream))
        writer = _Writer(service, generation, plan)
        if body.stream:
            usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            return EventStream(generation, writer.events(include_usage=usage))
        async with abort_when_gone(request.receive, generation):
            with generation:
                return await writer.whole()


class _Writer:
    """Turns a generation's deltas into the endpoint's JSON, streamed or whole."""

    def __init__(self, service: Service, generation: Generation, plan: ToolPlan) -> None:
        self._text = service.text
        self._generation = generation
        self._model = service.model_name
        on_calls = partial(service.note_calls, generation)
        self._parsers = [AnswerParser(service.text, plan, on_calls) for _ in generation.sequences]
        self._with_logprobs = generation.ask.params.logprobs >= 0

    async def whole(self) -> Response:
        count = len(self._parsers)
        texts = [""] * count
        calls: list[list[dict[str, Any]]] = [[] for _ in range(count)]
        logprobs: list[list[Any]] = [[] for _ in range(count)]
        reasons: list[str | None] = [None] * count
        while not self._generation.done:
            for delta in await self._generation.read():
                index = delta.index
                for piece in self._parsers[index].push(delta):
                    if isinstance(piece, TextPiece):
                        texts[index] += piece.text
                    elif piece.id is not None:
                        calls[index].append(_whole_call(piece))
                    else:
                        calls[index][piece.index]["function"]["arguments"] += piece.arguments
                if (info := self._logprobs(delta)) is not None:
                    logprobs[index] += info["content"]
                reasons[index] = self._reason(delta)
        choices = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": texts[index] or (None if calls[index] else ""),
                    "refusal": None,
                }
                | ({"tool_calls": calls[index]} if calls[index] else {}),
                "logprobs": {"content": logprobs[index], "refusal": None} if self._with_logprobs else None,
                "finish_reason": reasons[index],
            }
            for index in range(count)
        ]
        hints = self._generation.ask.hints
        body = self._base("chat.completion") | {"choices": choices, "usage": self._generation.usage.to_json()}
        return Response(_json.encode(body | hints.answer()), 200, hints.headers(), media_type="application/json")

    async def events(self, *, include_usage: bool) -> AsyncGenerator[bytes, None]:
        base = self._base("chat.completion.chunk")
        choice = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}'
        template = chunk_template(base, choice, include_usage=include_usage)
        first = chunk_template(base | self._generation.ask.hints.answer(), choice, include_usage=include_usage)
        greeting: bytes = b"".join(
            (template if index else first) % (index, b'{"role":"assistant","content":""}', b"null", b"null")
            for index in range(len(self._parsers))
        )
        while not self._generation.done:
            events = greeting + b"".join(
                [self._delta_events(template, delta) for delta in await self._generation.read()]
            )
            greeting = b""
            if events:
                yield events
        yield last_chunk(base, self._generation.usage if include_usage else None)

    def _delta_events(self, template: bytes, delta: Delta) -> bytes:
        info = self._logprobs(delta)
        logprobs = b"null" if info is None else _json.encode(info)
        events = b""
        for piece in self._parsers[delta.index].push(delta):
            if isinstance(piece, TextPiece):
                events += template % (delta.index, b'{"content":%b}' % _json.encode(piece.text), logprobs, b"null")
            else:
                call = _json.encode({"tool_calls": [_call_delta(piece)]})
                events += template % (delta.index, call, logprobs, b"null")
            logprobs = b"null"
        if delta.finish_reason is not None:
            events += template % (delta.index, b"{}", logprobs, _json.encode(self._reason(delta)))
        elif logprobs != b"null":
            events += template % (delta.index, b"{}", logprobs, b"null")
        return events

    def _base(self, kind: str) -> dict[str, Any]:
        generation = self._generation
        return {"id": generation.id, "object": kind, "created": generation.created, "model": self._model}

    def _reason(self, delta: Delta) -> str | None:
        if delta.finish_reason == "stop" and self._parsers[delta.index].has_calls:
            return "tool_calls"
        return delta.finish_reason

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        tokens = self._text.without_end(delta.tokens, delta.finish_reason)
        return chat_logprobs(self._text, tokens, delta.logprobs[: len(tokens)])


def _whole_call(piece: CallPiece) -> dict[str, Any]:
    return {"id": piece.id, "type": "function", "function": {"name": piece.name, "arguments": piece.arguments}}


def _call_delta(piece: CallPiece) -> dict[str, Any]:
    if piece.id is None:
        return {"index": piece.index, "function": {"arguments": piece.arguments}}
    return {"index": piece.index} | _whole_call(piece)
