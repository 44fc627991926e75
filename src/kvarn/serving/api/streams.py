"""/v1/streams: each stream's state, its reader's buffer, where its KV lives; and readers who tell how far they are."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from kvarn.errors import RequestError
from kvarn.serving.api.bodies import read_body
from kvarn.serving.api.engine_client import EngineLink
from kvarn.serving.api.messages import StreamReport, StreamsReport
from kvarn.serving.api.schemas import ReadRequest
from kvarn.serving.api.service import Service, answered
from kvarn.serving.api.small_endpoints import json_response

DEFAULT_LIMIT, MOST_STREAMS = 200, 1000
FRESH = 0.2
"""Seconds that a report is told again: whatever the number of watchers, the engine is asked five times a second."""

STREAMS_QUERY: Final[dict[str, Any]] = {
    "parameters": [
        {
            "name": "limit",
            "in": "query",
            "description": "Streams to list at most; the totals are of all.",
            "schema": {"type": "integer", "minimum": 1, "maximum": MOST_STREAMS, "default": DEFAULT_LIMIT},
        }
    ]
}


class Streams:
    """The endpoints. Watchers who ask at the same time share one answer of the engine."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._asking: asyncio.Task[StreamsReport | None] | None = None
        self._asked: tuple[EngineLink, int] | None = None
        self._fresh_until = 0.0

    async def index(self, request: Request) -> Response:
        service = self._service
        service.tenant(request)
        limit = _limit(request)
        link = service.running_engine()
        report = await answered(asyncio.shield(self._report(link, limit)))
        return json_response({"object": "list", "model": service.model_name} | _body(report, limit, link))

    async def read(self, request: Request, id: str) -> Response:
        """Clients that show text tell how far their readers are, so that nobody need guess."""
        service = self._service
        tenant = service.tenant(request)
        body = await read_body(request, ReadRequest, service.config.max_body_bytes)
        service.find(id, tenant).acknowledge(body.index, body.tokens, service.fastest_reader(tenant))
        return json_response({"status": "ok"})

    def _report(self, link: EngineLink, limit: int) -> asyncio.Task[StreamsReport | None]:
        """The answer to the latest question if it will do, else to a new one."""
        asking, now = self._asking, time.monotonic()
        will_do = self._asked is not None and self._asked[0] is link and self._asked[1] >= limit
        if asking is None or not will_do or (asking.done() and now > self._fresh_until):
            asking = self._asking = asyncio.create_task(link.report_streams(limit))
            self._asked, self._fresh_until = (link, limit), now + FRESH
        return asking


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(DEFAULT_LIMIT))
    limit = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if not 1 <= limit <= MOST_STREAMS:
        raise RequestError(f"limit is {text[:40]!r}; expected a whole number, 1 to {MOST_STREAMS}", field="limit")
    return limit


def _body(report: StreamsReport, limit: int, link: EngineLink) -> dict[str, object]:
    """The rest of answer_schemas.StreamList."""
    stats, ready = report.stats, link.ready
    assert ready is not None
    return {
        "data": [_stream(stream) for stream in report.streams[:limit]],
        "streams": {
            "total": stats.waiting + stats.loading + stats.running,
            "waiting": stats.waiting,
            "loading": stats.loading,
            "running": stats.running,
            "paused": report.paused,
        },
        "blocks": {
            "device": _tier(ready.num_blocks, ready.num_blocks - stats.blocks_free, stats.blocks_cached),
            "host": _tier(stats.host_blocks, stats.host_blocks_used, report.host_idle),
            "disk": _tier(stats.disk_blocks, stats.disk_blocks_used, 0),
        },
        "block_tokens": ready.block_size,
        "block_bytes": report.block_bytes,
        "tokens_per_second": round(link.tokens_per_second, 1),
        "copy_bytes_per_second": {
            "to_host": stats.to_host_rate or None,
            "from_host": stats.from_host_rate or None,
            "to_disk": stats.to_disk_rate or None,
            "from_disk": stats.from_disk_rate or None,
        },
    }


def _tier(total: int, used: int, cached: int) -> dict[str, int]:
    return {"total": total, "used": used, "cached": cached}


def _stream(stream: StreamReport) -> dict[str, object]:
    return {
        "id": stream.id,
        "state": stream.state,
        "paused": stream.paused,
        "age_seconds": round(stream.age, 3),
        "prompt_tokens": stream.prompt_tokens,
        "output_tokens": stream.output_tokens,
        "max_output_tokens": stream.max_output_tokens,
        "rate": round(stream.rate, 3),
        "unread_tokens": stream.unread_tokens,
        "slack_seconds": round(stream.slack, 3),
        "stalls": stream.stalls,
        "stall_seconds": round(stream.stall_seconds, 3),
        "preemptions": stream.preemptions,
        "blocks": {
            "needed": stream.blocks,
            "device": stream.device_blocks,
            "host": stream.host_blocks,
            "disk": stream.disk_blocks,
        },
    }
