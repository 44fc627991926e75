"""What the engine has of each request and where its KV lies, for people who watch it. Looks; changes nothing.

Made between two steps, so it must cost little whatever the engine holds: all requests are only ranked, and just the
most urgent are told of.
"""

from __future__ import annotations

import heapq

from kvarn.serving.api.messages import EngineStats, StreamReport, StreamsReport
from kvarn.serving.engine import Engine
from kvarn.serving.kvcache.tiers import KVPlaces
from kvarn.serving.request import Request, RequestState


def report_streams(engine: Engine, stats: EngineStats, limit: int) -> StreamsReport:
    """The `limit` most urgent requests of an engine, and the sums of all, which `stats` has for the most part."""
    now, tiers = engine.clock.now(), engine.tiers
    computed = {row.request.id for row in engine.batch.rows}
    urgent = heapq.nsmallest(limit, [*engine.waiting, *engine.loading, *engine.running], key=_waits_since)
    report = StreamsReport(
        stats=stats,
        paused=sum(request.id not in computed for request in engine.running),
        streams=[_report(engine, request, now, request.id not in computed) for request in urgent],
    )
    if tiers is not None:
        report.host_idle, report.block_bytes = tiers.host.num_idle, tiers.block_bytes
    return report


def _waits_since(request: Request) -> float:
    """When the reader began to wait for a token, or will: the lower, the more urgent."""
    return request.reader.dry_at() if request.reader.started else request.arrival


def _report(engine: Engine, request: Request, now: float, left_out: bool) -> StreamReport:
    cache, tiers, reader = engine.cache, engine.tiers, request.reader
    places = KVPlaces(cache.device_blocks(request)) if tiers is None else tiers.places(request)
    return StreamReport(
        id=request.id,
        state=request.state.value,
        paused=left_out and request.state is RequestState.RUNNING,
        age=now - request.arrival,
        prompt_tokens=request.prompt_length,
        output_tokens=request.num_outputs,
        max_output_tokens=request.max_outputs,
        rate=reader.rate,
        unread_tokens=reader.buffer(now),
        slack=reader.slack(now),
        stalls=reader.stalls,
        stall_seconds=reader.stall_seconds,
        preemptions=request.preemptions,
        blocks=cache.blocks_for(request.num_tokens),
        device_blocks=places.device,
        host_blocks=places.host,
        disk_blocks=places.disk,
    )
