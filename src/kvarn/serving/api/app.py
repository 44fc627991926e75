"""The HTTP application: which URL goes where, and every error in OpenAI's shape."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kvarn import __version__
from kvarn.errors import KvarnError
from kvarn.serving.api.chat_completions import ChatCompletions
from kvarn.serving.api.completions import Completions
from kvarn.serving.api.errors import ClientGone, explain
from kvarn.serving.api.service import Service

_log = logging.getLogger(__name__)


def make_app(service: Service) -> FastAPI:
    """The application around one service."""
    app = FastAPI(title="kvarn", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)

    def failed(request: Request, error: Exception) -> Response:
        answer = explain(error)
        service.metrics.errors.labels(answer.status).inc()
        return answer.response()

    for kind in (KvarnError, ValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, failed)
    app.add_exception_handler(ClientGone, _nobody_listens)
    app.add_api_route("/v1/chat/completions", ChatCompletions(service).create, methods=["POST"])
    app.add_api_route("/v1/completions", Completions(service).create, methods=["POST"])
    return app


def _nobody_listens(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
