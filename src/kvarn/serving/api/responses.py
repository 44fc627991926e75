"""/v1/responses: text and function tools in the newer shape, without stored conversations.

An answer is a list of items (a message, function calls). `_Answer` builds the items while the text comes and
says what changed as events; a request that is not streamed reads the events' end state.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from itertools import takewhile
from typing import Any
from uuid import uuid4

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kvarn.errors import RequestError
from kvarn.serving.api.bodies import read_body
from kvarn.serving.api.errors import ErrorAnswer
from kvarn.serving.api.generation import Ask, Delta, Generation, Usage, new_id
from kvarn.serving.api.logprobs import chat_logprobs
from kvarn.serving.api.schemas import InputItem, ResponsesRequest
from kvarn.serving.api.service import Service, abort_when_gone, output_limit
from kvarn.serving.api.sse import EventStream
from kvarn.serving.api.tools import AnswerParser, TextPiece, ToolPlan
from kvarn.serving.api.translate import text_grammar
from kvarn.serving.sampling.params import SamplingParams

_json = msgspec.json.Encoder()
Event = dict[str, Any]


class Responses:
    """The endpoint; `create` is its handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, request: Request) -> Response:
        arrival = time.monotonic()
        service = self._service
        tenant = service.tenant(request)
        body = await read_body(request, ResponsesRequest, service.config.max_body_bytes)
        service.check_model(body.model)
        _refuse_unsupported(body)
        link, ready = await service.engine()
        plan = _tool_plan(body)
        prompt = await service.text.encode_chat(_messages(body), plan.offered, {})
        max_tokens = output_limit(
            len(prompt.tokens),
            body.max_output_tokens,
            service.config.default_max_tokens,
            ready.max_context,
            field="max_output_tokens",
            prompt_field="input",
        )
        params = SamplingParams(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            max_tokens=max_tokens,
            logprobs=-1 if body.top_logprobs is None else body.top_logprobs,
            grammar=plan.grammar(service.text) or text_grammar(body.text.format if body.text else None),
        )
        rate = service.stream_rate(request, body.stream_rate, tenant)
        ask = Ask(
            "responses",
            [prompt],
            params,
            tenant=tenant,
            stream_rate=rate,
            hints=service.hints(request, body),
            tools=bool(plan.offered),
            continues=service.calls.request_of(tenant, _answered_calls(body)),
            round=body.round_hint,
        )
        generation = service.generate(new_id("resp_"), ask, link, arrival, streams=bool(body.stream))
        answer = _Answer(service, generation, plan, body)
        if body.stream:
            return EventStream(generation, answer.stream(), answer.error_event)
        async with abort_when_gone(request.receive, generation):
            with generation:
                return await answer.whole()


class _Answer:
    """The response object while it grows."""

    def __init__(self, service: Service, generation: Generation, plan: ToolPlan, body: ResponsesRequest) -> None:
        self._text = service.text
        self._generation = generation
        self._parser = AnswerParser(service.text, plan, partial(service.note_calls, generation))
        self._with_logprobs = generation.ask.params.logprobs >= 0
        self._base = _response_base(service.model_name, generation, body)
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        """The item being written: the last of `_output`."""
        self._status = "in_progress"
        self._count = 0

    async def whole(self) -> Response:
        while not self._generation.done:
            for delta in await self._generation.read():
                for _ in self._changes(delta):
                    pass
        headers = self._generation.ask.hints.headers()
        return Response(_json.encode(self._response()), 200, headers, media_type="application/json")

    async def stream(self) -> AsyncGenerator[bytes, None]:
        news = await self._generation.read()
        greeting = [{"type": f"response.{name}", "response": self._response()} for name in ("created", "in_progress")]
        events = b"".join(map(self._encode, greeting))
        while True:
            events += b"".join([self._encode(event) for delta in news for event in self._changes(delta)])
            if self._generation.done:
                break
            if events:
                yield events
            events = b""
            news = await self._generation.read()
        yield events + self._encode({"type": f"response.{self._status}", "response": self._response()})

    def error_event(self, answer: ErrorAnswer) -> bytes:
        return self._encode(
            {"type": "error", "code": answer.code, "message": answer.message, "param": answer.param} | answer.body()
        )

    def _encode(self, event: Event) -> bytes:
        event["sequence_number"] = self._count
        self._count += 1
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), _json.encode(event))

    def _changes(self, delta: Delta) -> Iterator[Event]:
        """Add `delta` to the items; the events that tell a client so."""
        logprobs: list[dict[str, Any]] = []
        if self._with_logprobs:
            tokens = self._text.without_end(delta.tokens, delta.finish_reason)
            logprobs = chat_logprobs(self._text, tokens, delta.logprobs[: len(tokens)])["content"]
        for piece in self._parser.push(delta):
            if isinstance(piece, TextPiece):
                yield from self._add_text(piece.text, logprobs)
                logprobs = []
            elif piece.id is not None:
                yield from self._close()
                call = {"type": "function_call", "id": f"fc_{uuid4().hex}", "call_id": piece.id, "name": piece.name}
                yield self._add_item(call | {"arguments": "", "status": "in_progress"})
            elif self._open is not None:
                self._open["arguments"] += piece.arguments
                yield self._event("response.function_call_arguments.delta", delta=piece.arguments)
        if delta.finish_reason is not None:
            if not self._output:
                yield from self._add_text("", logprobs)
            self._status = "incomplete" if delta.finish_reason == "length" else "completed"
            yield from self._close(self._status)

    def _add_text(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        if self._open is None or self._open["type"] != "message":
            yield from self._close()
            item = {"type": "message", "id": f"msg_{uuid4().hex}", "role": "assistant", "status": "in_progress"}
            yield self._add_item(item | {"content": []})
            assert self._open is not None
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._event("response.content_part.added", content_index=0, part=part | {"logprobs": []})
            self._open["content"].append(part)
        part = self._open["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        yield self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _add_item(self, item: dict[str, Any]) -> Event:
        self._output.append(item)
        self._open = item
        return {"type": "response.output_item.added", "output_index": len(self._output) - 1, "item": dict(item)}

    def _close(self, status: str = "completed") -> Iterator[Event]:
        """End the open item, if there is one."""
        item = self._open
        if item is None:
            return
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            yield self._event(
                "response.output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"]
            )
            yield self._event("response.content_part.done", content_index=0, part=part)
        else:
            yield self._event("response.function_call_arguments.done", name=item["name"], arguments=item["arguments"])
        yield {"type": "response.output_item.done", "output_index": len(self._output) - 1, "item": item}
        self._open = None

    def _event(self, type: str, **fields: Any) -> Event:
        assert self._open is not None
        return {"type": type, "item_id": self._open["id"], "output_index": len(self._output) - 1} | fields

    def _response(self) -> dict[str, Any]:
        ended = self._status != "in_progress"
        return self._base | {
            "status": self._status,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "output": self._output,
            "usage": _usage_json(self._generation.usage) if ended else None,
        }


# ---- what comes in ---------------------------------------------------------------------------------------


def _refuse_unsupported(body: ResponsesRequest) -> None:
    if body.previous_response_id is not None or body.conversation is not None:
        field = "conversation" if body.previous_response_id is None else "previous_response_id"
        raise RequestError(
            f"{field} is not supported: this server stores no responses; send the whole conversation as input",
            field=field,
        )
    if body.background:
        raise RequestError("background is not supported; leave it out or send false", field="background")


def _tool_plan(body: ResponsesRequest) -> ToolPlan:
    tools = []
    for tool in body.tools or ():
        facts = tool.model_dump(exclude_none=True, include={"name", "description", "parameters", "strict"})
        tools.append({"type": "function", "function": facts})
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return ToolPlan.make(tools, choice, None, body.parallel_tool_calls)
    return ToolPlan.make(tools, None, choice.name, body.parallel_tool_calls)


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation as chat messages. Raises RequestError for an item that lacks what its type needs."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for index, item in enumerate(body.input):
        message = _message_of(item, f"input[{index}]")
        if "tool_calls" in message and messages and "tool_calls" in messages[-1]:
            messages[-1]["tool_calls"] += message["tool_calls"]  # calls made together belong to one turn
        else:
            messages.append(message)
    return messages


def _message_of(item: InputItem, where: str) -> dict[str, Any]:
    match item.type:
        case "function_call":
            if item.name is None or item.arguments is None:
                raise RequestError(f"{where} is a function_call; it needs name and arguments", field=where)
            call = {"id": item.call_id or "", "type": "function"}
            function = {"name": item.name, "arguments": item.arguments}
            return {"role": "assistant", "content": None, "tool_calls": [call | {"function": function}]}
        case "function_call_output":
            if item.call_id is None or item.output is None:
                raise RequestError(f"{where} is a function_call_output; it needs call_id and output", field=where)
            return {"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)}
        case _:
            if item.role is None or item.content is None:
                raise RequestError(f"{where} is a message; it needs role and content", field=where)
            return {"role": item.role, "content": _content(item.content)}


def _answered_calls(body: ResponsesRequest) -> list[str]:
    """Ids of the function calls whose results end the conversation, the last first."""
    items = [] if isinstance(body.input, str) else body.input
    results = takewhile(lambda item: item.type == "function_call_output", reversed(items))
    return [item.call_id for item in results if item.call_id]


def _content(content: Any) -> Any:
    return content if isinstance(content, str) else [part.model_dump(exclude_none=True) for part in content]


# ---- what goes out ---------------------------------------------------------------------------------------


def _response_base(model: str, generation: Generation, body: ResponsesRequest) -> dict[str, Any]:
    """The fields that do not change while the answer grows."""
    choice = body.tool_choice
    return {
        "id": generation.id,
        "object": "response",
        "created_at": generation.created,
        "error": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": generation.ask.params.temperature,
        "text": {"format": _text_format(body)},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump() if choice else "auto",
        "tools": [
            {"type": "function", "description": None, "parameters": None, "strict": None}
            | tool.model_dump(include={"name", "description", "parameters", "strict"})
            for tool in body.tools or ()
        ],
        "top_p": generation.ask.params.top_p,
        "truncation": "disabled",
        "user": body.user,
    } | generation.ask.hints.answer()


def _text_format(body: ResponsesRequest) -> dict[str, Any]:
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    return body.text.format.model_dump(by_alias=True, exclude_none=True)


def _usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": usage.prompt_details() | {"cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
