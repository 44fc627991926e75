"""/v1/rounds: how rounds and shared segments go, in sums and for the last rounds."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from kvarn.serving.api.answer_schemas import RoundTotals
from kvarn.serving.api.engine_client import EngineLink
from kvarn.serving.api.service import Service
from kvarn.serving.api.small_endpoints import json_response
from kvarn.serving.api.watching import Watching, limit_of, limit_query
from kvarn.serving.rounds_report import RoundFacts, RoundReport

DEFAULT_LIMIT, MOST_ROUNDS = 50, 500
ROUNDS_QUERY: Final = limit_query("Rounds to list at most; the totals are of all.", DEFAULT_LIMIT, MOST_ROUNDS)


class Rounds:
    """The endpoint; `index` is its handler."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._watching = Watching(EngineLink.report_rounds)

    async def index(self, request: Request) -> Response:
        service = self._service
        service.tenant(request)
        limit = limit_of(request, DEFAULT_LIMIT, MOST_ROUNDS)
        report = await self._watching.report(service.running_engine(), limit)
        facts = report.stats.rounds or RoundFacts()
        body = {
            "object": "list",
            "model": service.model_name,
            "data": [_round(each) for each in report.rounds[:limit]],
            "totals": {name: getattr(facts, name) for name in RoundTotals.model_fields},
        }
        return json_response(body)


def _round(report: RoundReport) -> dict[str, object]:
    """answer_schemas.Round."""
    return {
        "id": report.id,
        "members": report.members,
        "arrived": report.arrived,
        "waited_seconds": round(report.waited_seconds, 4),
        "mode": report.mode,
        "segments": report.segments,
        "reused_tokens": report.reused_tokens,
        "refreshed_tokens": report.refreshed_tokens,
    }
