"""/openapi.json: FastAPI writes it from the routes; what it cannot know, since bodies are read by hand, is here."""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from kvarn.serving.api.answer_schemas import ErrorBody

ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    "4XX": {"model": ErrorBody, "description": "The request is at fault, or came too soon (429)"},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer now; see Retry-After"},
}
_REFERENCE: Final = "#/components/schemas/{model}"


def asks(body: type[BaseModel]) -> dict[str, Any]:
    """The part of a route's description that names its request body."""
    schema = {"$ref": _REFERENCE.format(model=body.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


_EVENT: dict[str, Any] = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON, or [DONE]"}},
    "required": ["data"],
}
"""One server-sent event: before OpenAPI 3.2 the schema of an event stream describes each event."""


def answer(result: type[BaseModel] | None, *, streams: bool = False) -> dict[str, Any]:
    """The description of a route's 200; without a `result` it is plain text."""
    if result is None:
        return {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}
    streamed = {"content": {"text/event-stream": {"schema": _EVENT}}} if streams else {}
    return {"model": result, "description": "OK", **streamed}


def describe(app: FastAPI, bodies: list[type[BaseModel]], *, keys: bool) -> None:
    """Make `app` describe the request bodies, and the bearer key where one is needed."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            definitions = models_json_schema([(body, "validation") for body in bodies], ref_template=_REFERENCE)[1]
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {}).update(definitions["$defs"])
            if keys:
                components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                schema["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
