"""Every failure as OpenAI clients expect it: {"error": {"message", "type", "param", "code"}} and an HTTP status.

Exceptions come in, an `ErrorAnswer` goes out; it becomes a response, or an event where a stream has begun.
"""

from __future__ import annotations

import http
import math
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kvarn.errors import EngineDead, KvarnError, RequestError


class Unavailable(KvarnError):
    """The server cannot take the request now; `retry_after` (seconds) says when to try again."""

    status = 503
    code = "unavailable"

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(Unavailable):
    """Too many requests are waiting or running."""

    status = 429
    code = "rate_limit_exceeded"


class RequestTimeout(KvarnError):
    """The request took longer than the server's limit and was given up."""


class GenerationFailed(KvarnError):
    """The engine could not go on with this request, through no fault of the client's."""


class ClientGone(Exception):
    """The client closed its connection: nobody reads the answer."""


@dataclass(frozen=True)
class ErrorAnswer:
    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None
    allow: str | None = None
    """The methods that a URL does take."""

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def encoded(self) -> bytes:
        # Messages may quote what the client sent; a lone surrogate in it must not break the answer.
        safe = self.message.encode("utf-8", "replace").decode()
        body = self.body()
        body["error"]["message"] = safe
        return msgspec.json.encode(body)

    def response(self) -> Response:
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.allow is not None:
            headers["allow"] = self.allow
        if self.status == 413:
            headers["connection"] = "close"  # the rest of the body is not read
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(self.encoded(), self.status, headers, media_type="application/json")


_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def _type_of(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def explain(error: BaseException) -> ErrorAnswer:
    """What to tell the client about `error`. Bugs are answered with 500 and no detail."""
    match error:
        case RequestError():
            return ErrorAnswer(error.status, str(error), _type_of(error.status), error.field, error.code)
        case Unavailable():
            return ErrorAnswer(
                error.status, str(error), _type_of(error.status), code=error.code, retry_after=error.retry_after
            )
        case EngineDead():
            return ErrorAnswer(503, str(error), "server_error", code="engine_dead", retry_after=1)
        case RequestTimeout():
            return ErrorAnswer(504, str(error), "timeout_error", code="request_timeout")
        case GenerationFailed():
            return ErrorAnswer(500, str(error), "server_error", code="generation_failed")
        case HTTPException():
            return _explain_http(error)
        case KvarnError():
            return ErrorAnswer(400, str(error), "invalid_request_error")
        case _:
            return ErrorAnswer(
                500, "the server failed on this request; its log says why", "server_error", code="internal_error"
            )


def _explain_http(error: HTTPException) -> ErrorAnswer:
    detail = error.detail
    if error.status_code == 404:
        detail = "there is nothing at this URL; the API lives under /v1 (see /openapi.json)"
    elif error.status_code == 405:
        detail = "this URL does not take that HTTP method; /openapi.json lists what does"
    allow = (error.headers or {}).get("Allow")
    code = http.HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    return ErrorAnswer(error.status_code, detail, _type_of(error.status_code), code=code, allow=allow)
