"""/v1/streams: each stream's state, its reader's buffer, where its KV lives; and readers who tell how far they are."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from kvarn.serving.api.bodies import read_body
from kvarn.serving.api.engine_client import EngineLink
from kvarn.serving.api.messages import StreamReport, StreamsReport
from kvarn.serving.api.schemas import ReadRequest
from kvarn.serving.api.service import Service
from kvarn.serving.api.small_endpoints import json_response
from kvarn.serving.api.watching import Watching, limit_of, limit_query

DEFAULT_LIMIT, MOST_STREAMS = 200, 1000
STREAMS_QUERY: Final = limit_query("Streams to list at most; the totals are of all.", DEFAULT_LIMIT, MOST_STREAMS)


class Streams:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._watching = Watching(EngineLink.report_streams)

    async def index(self, request: Request) -> Response:
        service = self._service
        service.tenant(request)
        limit = limit_of(request, DEFAULT_LIMIT, MOST_STREAMS)
        link = service.running_engine()
        report = await self._watching.report(link, limit)
        return json_response({"object": "list", "model": service.model_name} | _body(report, limit, link))

    async def read(self, request: Request, id: str) -> Response:
        """Clients that show text tell how far their readers are, so that nobody need guess."""
        service = self._service
        tenant = service.tenant(request)
        body = await read_body(request, ReadRequest, service.config.max_body_bytes)
        service.find(id, tenant).acknowledge(body.index, body.tokens, service.fastest_reader(tenant))
        return json_response({"status": "ok"})


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
