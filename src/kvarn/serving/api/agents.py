"""/v1/agents: clients tell how their tool calls go."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from kvarn.errors import RequestError
from kvarn.serving.agents.events import AgentEvent, CallFinish, CallProgress, CallReport, CallStart, Close
from kvarn.serving.agents.hints import UNKNOWN
from kvarn.serving.api.bodies import read_body
from kvarn.serving.api.messages import Told
from kvarn.serving.api.schemas import EventRequest
from kvarn.serving.api.service import Service, answered
from kvarn.serving.api.small_endpoints import json_response

_CODES = {400: "invalid_value", 404: "not_found", 409: "conflict"}


class Agents:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def event(self, request: Request) -> Response:
        """Hand an event to the engine; the answer says where the call stands after it."""
        service = self._service
        tenant = service.tenant(request)
        body = await read_body(request, EventRequest, service.config.max_body_bytes)
        event = _event(body, self._engine_request(body.request, tenant), tenant)
        told = await answered(service.running_engine().tell(event))
        if told.report is None:
            raise _refusal(told, event.request, body.request or "")
        return json_response(_call(told.report, body.request or ""))

    def _engine_request(self, id: str | None, tenant: str) -> str:
        """The engine's name of what a client names by its answer, or by one of the answer's tool calls."""
        if id is None:
            return ""
        if self._service.calls.is_plural(tenant, id):
            raise RequestError(
                f"request is {id!r}, which had several prompts or answers (n): none of them is meant by it; "
                "ask for one answer where a tool call is to be followed",
                field="request",
                code="invalid_value",
            )
        return self._service.calls.request_of(tenant, [id]) or f"{id}-0"


def _event(body: EventRequest, request: str, tenant: str) -> AgentEvent:
    """The event for the engine. Raises RequestError for one that lacks what its type needs."""
    if not request and (body.type != "close" or body.program is None):
        what = "request, or program," if body.type == "close" else "request"
        raise RequestError(f"{body.type} needs {what} to say which call is meant", field="request")
    seconds = UNKNOWN if body.seconds is None else body.seconds
    match body.type:
        case "call_start":
            return CallStart(request, tenant, body.tool or "", seconds, tuple(body.stages or ()))
        case "call_progress":
            if body.stage is None and body.fraction is None:
                raise RequestError("call_progress needs stage or fraction", field="fraction")
            return CallProgress(request, tenant, body.stage or "", UNKNOWN if body.fraction is None else body.fraction)
        case "call_finish":
            return CallFinish(request, tenant, seconds)
        case "close":
            return Close(request, tenant, body.program or "")


def _refusal(told: Told, engine_id: str, sent: str) -> RequestError:
    """The engine's words, about the id that the client knows."""
    message = told.error.replace(engine_id, sent) if engine_id else told.error
    return RequestError(message, field=told.field, code=_CODES.get(told.status), status=told.status)


def _call(report: CallReport, sent: str) -> dict[str, object]:
    """answer_schemas.AgentCall."""
    times = {
        "expected_seconds": report.expected_seconds,
        "remaining_seconds": report.remaining_seconds,
        "deadline_seconds": report.deadline_seconds,
    }
    return {
        "object": "agent.call",
        "request": sent,
        "state": report.state,
        **{name: None if seconds < 0 else round(seconds, 3) for name, seconds in times.items()},
        "held_blocks": report.held_blocks,
        "closed": report.closed,
    }
