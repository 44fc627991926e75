"""The small endpoints: which model is served, tokenising, and whether all is well."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kvarn.errors import RequestError
from kvarn.serving.api.bodies import read_body
from kvarn.serving.api.errors import Unavailable
from kvarn.serving.api.schemas import DetokenizeRequest, TokenizeRequest, messages_json, tools_json
from kvarn.serving.api.service import Service


class Models:
    """/v1/models"""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def index(self, request: Request) -> Response:
        self._service.tenant(request)
        return json_response({"object": "list", "data": [self._model()]})

    async def show(self, request: Request, model: str) -> Response:
        self._service.tenant(request)
        self._service.check_model(model)
        return json_response(self._model())

    def _model(self) -> dict[str, object]:
        service = self._service
        link = service.supervisor.link
        ready = link.ready if link is not None else None
        return {
            "id": service.model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "kvarn",
            "max_model_len": ready.max_context if ready is not None else None,
            "reuse": ready.reuse if ready is not None else None,
        }


class Tokens:
    """/tokenize and /detokenize"""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, request: Request) -> Response:
        service = self._service
        service.tenant(request)
        body = await read_body(request, TokenizeRequest, service.config.max_body_bytes)
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("send either prompt or messages", field="prompt")
        if body.prompt is not None:
            tokens = await service.text.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        else:
            prompt = await service.text.encode_chat(messages_json(body.messages), tools_json(body.tools), {})
            tokens = prompt.tokens
        link = service.supervisor.link
        answer: dict[str, object] = {
            "count": len(tokens),
            "max_model_len": link.ready.max_context if link is not None and link.ready is not None else None,
            "tokens": tokens,
        }
        if body.return_token_strs:
            answer["token_strs"] = [service.text.piece(token).decode("utf-8", "replace") for token in tokens]
        return json_response(answer)

    async def detokenize(self, request: Request) -> Response:
        service = self._service
        service.tenant(request)
        body = await read_body(request, DetokenizeRequest, service.config.max_body_bytes)
        service.check_model(body.model)
        return json_response({"prompt": await service.text.decode(body.tokens)})


class Condition:
    """/health: does the engine live. /ready: should requests come here. /metrics: how it goes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def health(self, request: Request) -> Response:
        if self._service.supervisor.link is None:
            raise Unavailable("the engine is not running; it is being started", retry_after=2)
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        if self._service.draining:
            raise Unavailable("the server is shutting down", retry_after=5)
        return await self.health(request)

    async def metrics(self, request: Request) -> Response:
        self._service.tenant(request)
        return Response(self._service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def json_response(body: object) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
