"""Request bodies: read within the size limit, checked to be JSON of the right shape."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request

from kvarn.errors import RequestError
from kvarn.serving.api.errors import ClientGone

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, model: type[Model], limit: int) -> Model:
    """The body as a `model`. Raises RequestError (413, 415) or pydantic's ValidationError (400)."""
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
    return model.model_validate_json(bytes(body))


def _too_large(limit: int) -> RequestError:
    return RequestError(
        f"the request body is larger than {limit} bytes, the most this server takes", code="body_too_large", status=413
    )
