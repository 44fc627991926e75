"""/v1/agents: clients tell how their tool calls go; programs, their calls and where their KV lies are shown."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from kvarn.errors import RequestError
from kvarn.serving.agents.events import AgentEvent, CallFinish, CallProgress, CallReport, CallStart, Close
from kvarn.serving.agents.hints import UNKNOWN
from kvarn.serving.api.answer_schemas import AgentTotals
from kvarn.serving.api.bodies import read_body
from kvarn.serving.api.engine_client import EngineLink
from kvarn.serving.api.messages import AgentsReport, AgentStats, NodeReport, ProgramReport, Told
from kvarn.serving.api.schemas import EventRequest
from kvarn.serving.api.service import Service, answered
from kvarn.serving.api.small_endpoints import json_response
from kvarn.serving.api.watching import Watching, limit_of, limit_query

DEFAULT_LIMIT, MOST_PROGRAMS = 50, 500
AGENTS_QUERY: Final = limit_query("Programs to list at most; the totals are of all.", DEFAULT_LIMIT, MOST_PROGRAMS)
_CODES = {400: "invalid_value", 404: "not_found", 409: "conflict"}


class Agents:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._watching = Watching(EngineLink.report_agents)

    async def index(self, request: Request) -> Response:
        """What agents do."""
        service = self._service
        service.tenant(request)
        limit = limit_of(request, DEFAULT_LIMIT, MOST_PROGRAMS)
        link = service.running_engine()
        report = await self._watching.report(link, limit)
        return json_response({"object": "list", "model": service.model_name} | _body(report, limit, link))

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
    return {"object": "agent.call", "request": sent, **_stand(report), "closed": report.closed}


def _stand(report: CallReport) -> dict[str, object]:
    """answer_schemas.CallFacts."""
    return {
        "state": report.state,
        "expected_seconds": _known(report.expected_seconds),
        "remaining_seconds": _known(report.remaining_seconds),
        "elapsed_seconds": _known(report.elapsed_seconds),
        "deadline_seconds": _known(report.deadline_seconds),
        "held_blocks": report.held_blocks,
    }


def _known(seconds: float) -> float | None:
    return None if seconds < 0 else round(seconds, 3)


def _body(report: AgentsReport, limit: int, link: EngineLink) -> dict[str, object]:
    """The rest of answer_schemas.AgentList."""
    stats, ready = report.stats.agents or AgentStats(), link.ready
    assert ready is not None
    return {
        "data": [_program(program) for program in report.programs[:limit]],
        "programs": stats.programs,
        "calls": stats.calls,
        "totals": {name: getattr(stats, name) for name in AgentTotals.model_fields},
        "blocks": report.blocks,
        "num_blocks": ready.num_blocks,
        "block_tokens": ready.block_size,
    }


def _program(program: ProgramReport) -> dict[str, object]:
    return {
        "id": program.id,
        "age_seconds": round(program.age, 3),
        "idle_seconds": round(program.idle, 3),
        "work_tokens": round(program.work_tokens, 1),
        "remaining_seconds": _known(program.remaining_seconds),
        "total_seconds": _known(program.total_seconds),
        "nodes": [_node(node) for node in program.nodes],
    }


def _node(node: NodeReport) -> dict[str, object]:
    hints, answer = node.hints, node.request.removesuffix("-0")
    return {
        "name": answer if node.name == node.request else node.name,
        "request": answer,
        "agent": hints.agent,
        "after": hints.after,
        "join": hints.join,
        "depth": hints.depth,
        "critical": hints.critical,
        "importance": hints.importance,
        "state": node.state,
        "tool": node.tool,
        "age_seconds": _known(node.age),
        "tokens": node.tokens,
        "call": None if node.call is None else _stand(node.call),
        "blocks": {
            "needed": node.blocks,
            "device": node.device_blocks,
            "host": node.host_blocks,
            "disk": node.disk_blocks,
            "reserved": node.reserved_blocks,
        },
    }
