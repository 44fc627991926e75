"""Request bodies: read within the size limit, checked to be JSON of the right shape."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from kvarn.errors import RequestError
from kvarn.serving.api.errors import ClientGone

Model = TypeVar("Model", bound=BaseModel)

MANY_PROBLEMS = 1000
"""More than these are counted and not looked at: describing each takes microseconds of the event loop."""


async def read_body(request: Request, model: type[Model], limit: int) -> Model:
    """The body as a `model`. Raises RequestError (400, 413, 415)."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise RequestError(
            f"Content-Type is {media_type!r}; send the body as application/json",
            code="unsupported_media_type",
            status=415,
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_large(limit)
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise _too_large(limit)
    except ClientDisconnect:
        raise ClientGone from None
    # Parsing and validating in one go: the JSON parser refuses what no text can hold (lone surrogates, bad UTF-8),
    # numbers of thousands of digits and endless nesting.
    try:
        return model.model_validate_json(bytes(body))
    except ValidationError as error:
        raise _explained(error, bytes(body)) from None


def _explained(error: ValidationError, body: bytes) -> RequestError:
    """What is wrong at the deepest place: where a field takes several types that is the one most likely meant."""
    if error.error_count() > MANY_PROBLEMS:
        return RequestError(
            f"the request body is wrong in {error.error_count()} places; see /openapi.json for what it may hold",
            code="invalid_value",
        )
    problems = error.errors(include_url=False, include_input=False)
    if problems[0]["type"] == "json_invalid":
        reason = problems[0]["msg"].removeprefix("Invalid JSON: ")
        return RequestError(f"the request body is not valid JSON: {reason}", code="invalid_json")
    sent = from_json(body)
    places = [_place(sent, problem["loc"], missing=problem["type"] == "missing") for problem in problems]
    deepest = max(places, key=len)
    messages = dict.fromkeys(
        problem["msg"] for problem, place in zip(problems, places, strict=True) if place == deepest
    )
    field = ".".join(map(str, deepest)) or None
    return RequestError(f"{field or 'body'}: {'; or: '.join(messages)}", field=field, code="invalid_value")


def _place(sent: Any, loc: tuple[int | str, ...], *, missing: bool) -> list[int | str]:
    """The part of pydantic's path that the client would recognise: not the names of a union's branches."""
    place: list[int | str] = []
    for number, part in enumerate(loc):
        if _has(sent, part):
            sent = sent[part]
        elif not (missing and number == len(loc) - 1):
            continue
        place.append(part)
    return place


def _has(sent: Any, part: int | str) -> bool:
    if isinstance(sent, list):
        return isinstance(part, int) and part < len(sent)
    return isinstance(sent, dict) and part in sent


def _too_large(limit: int) -> RequestError:
    return RequestError(
        f"the request body is larger than {limit} bytes, the most this server takes", code="body_too_large", status=413
    )
