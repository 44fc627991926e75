"""The HTTP application: which URL goes where, and every error in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kvarn import __version__
from kvarn.errors import KvarnError
from kvarn.serving.api.agents import AGENTS_QUERY, Agents
from kvarn.serving.api.answer_schemas import (
    AgentCall,
    AgentList,
    ChatCompletion,
    Completion,
    Detokenized,
    Health,
    Model,
    ModelList,
    ResponseObject,
    RoundList,
    StreamList,
    Tokenized,
)
from kvarn.serving.api.chat_completions import ChatCompletions
from kvarn.serving.api.completions import Completions
from kvarn.serving.api.errors import ClientGone, explain
from kvarn.serving.api.openapi import ERRORS, answer, asks, describe
from kvarn.serving.api.pages import add_pages
from kvarn.serving.api.responses import Responses
from kvarn.serving.api.rounds import ROUNDS_QUERY, Rounds
from kvarn.serving.api.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EventRequest,
    ReadRequest,
    ResponsesRequest,
    TokenizeRequest,
)
from kvarn.serving.api.service import Service
from kvarn.serving.api.small_endpoints import Condition, Models, Tokens
from kvarn.serving.api.streams import STREAMS_QUERY, Streams

Handler = Callable[..., Awaitable[Response]]


def make_app(service: Service) -> FastAPI:
    """The application around one service."""
    app = FastAPI(title="kvarn", version=__version__, docs_url=None, redoc_url=None, responses=ERRORS)

    def failed(request: Request, error: Exception) -> Response:
        explained = explain(error)
        service.metrics.errors.labels(explained.status).inc()
        return explained.response()

    for kind in (KvarnError, HTTPException, Exception):
        app.add_exception_handler(kind, failed)
    app.add_exception_handler(ClientGone, lambda request, error: Response(status_code=499))

    bodies: list[type[BaseModel]] = []

    def post(
        path: str, handler: Handler, body: type[BaseModel], result: type[BaseModel], *, streams: bool = False
    ) -> None:
        bodies.append(body)
        app.add_api_route(
            path, handler, methods=["POST"], responses={200: answer(result, streams=streams)}, openapi_extra=asks(body)
        )

    def get(path: str, handler: Handler, result: type[BaseModel] | None, query: dict[str, Any] | None = None) -> None:
        app.add_api_route(path, handler, methods=["GET"], responses={200: answer(result)}, openapi_extra=query)

    post("/v1/chat/completions", ChatCompletions(service).create, ChatRequest, ChatCompletion, streams=True)
    post("/v1/completions", Completions(service).create, CompletionRequest, Completion, streams=True)
    post("/v1/responses", Responses(service).create, ResponsesRequest, ResponseObject, streams=True)
    agents = Agents(service)
    get("/v1/agents", agents.index, AgentList, AGENTS_QUERY)
    post("/v1/agents/events", agents.event, EventRequest, AgentCall)
    get("/v1/rounds", Rounds(service).index, RoundList, ROUNDS_QUERY)
    models, tokens, condition = Models(service), Tokens(service), Condition(service)
    streams = Streams(service)
    get("/v1/streams", streams.index, StreamList, STREAMS_QUERY)
    post("/v1/streams/{id}/read", streams.read, ReadRequest, Health)
    get("/v1/models", models.index, ModelList)
    get("/v1/models/{model:path}", models.show, Model)
    post("/tokenize", tokens.tokenize, TokenizeRequest, Tokenized)
    post("/detokenize", tokens.detokenize, DetokenizeRequest, Detokenized)
    get("/health", condition.health, Health)
    get("/ready", condition.ready, Health)
    get("/metrics", condition.metrics, None)
    add_pages(app)
    describe(app, bodies, keys=bool(service.config.api_keys))
    return app
