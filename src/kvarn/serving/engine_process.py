"""The engine's own process: two sockets around the step loop.

Started by the API process as `python -m kvarn.serving.engine_process`. Pulls messages from the API, steps
while there is work, has what came of it pushed during the next step; sleeps in the socket when there is none. Ends
on Shutdown, on SIGTERM, or when its standard input closes, which is how it notices that its parent is gone.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import zmq

from kvarn.errors import KvarnError, RequestError
from kvarn.serving.agents_report import agent_stats, report_agents
from kvarn.serving.api.messages import (
    Acknowledge,
    Cancel,
    EngineStats,
    FromEngine,
    Loading,
    Ready,
    RoundsReport,
    Shutdown,
    StartFailed,
    StepOutputs,
    Submit,
    Tell,
    ToEngine,
    TokenOutput,
    Told,
    Watch,
    WatchAgents,
    WatchRounds,
)
from kvarn.serving.config import EngineConfig
from kvarn.serving.engine import Emission, Engine
from kvarn.serving.kvcache.copies import Direction
from kvarn.serving.kvcache.tiers import Tiers
from kvarn.serving.processors import wait_gently
from kvarn.serving.request import FinishReason, Request
from kvarn.serving.settle import settle
from kvarn.serving.streams_report import report_streams

if TYPE_CHECKING:
    from kvarn.serving.assemble import LoadedEngine

_log = logging.getLogger(__name__)

_IDLE_POLL, _SETTLE_POLL = 1000, 10
"""Milliseconds to sleep for a message at a time: when there is nothing to do, and when only copies are to be ended."""
_STATS_INTERVAL = 0.25
"""Seconds between two EngineStats at least."""


class EngineProcess:
    """Message loop around one engine."""

    def __init__(self, engine: Engine, eos_tokens: frozenset[int], inbox: zmq.Socket[bytes], outbox: Outbox) -> None:
        self.engine = engine
        self.eos_tokens = eos_tokens
        self.inbox = inbox
        self.outbox = outbox
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._stats_due = 0.0
        self._running = True

    def run(self) -> None:
        """Serve until Shutdown."""
        while self._running:
            self._receive(wait=not self.engine.has_work)
            if not self._running:
                break
            self._send(_to_outputs(self.engine.step()))
            if rest := self.engine.rest_seconds():
                self.inbox.poll(int(rest * 1000))

    def stop(self) -> None:
        self._running = False

    def _receive(self, *, wait: bool) -> None:
        """Handle every message that is there; with `wait`, wait for one (and report when the engine falls idle)."""
        if wait and not self.inbox.poll(0):
            self._send([], force_stats=True)
            while self._running and not self.inbox.poll(_SETTLE_POLL if self.engine.settle() else _IDLE_POLL):
                self._send([])  # what has been copied meanwhile
        while self._running:
            try:
                message = self._decoder.decode(self.inbox.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            self._handle(message)

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._add(message)
            case Cancel():
                self.engine.cancel(message.id)
            case Acknowledge():
                self.engine.acknowledge(message.id, message.tokens, message.fastest)
            case Watch():
                self.outbox.send(report_streams(self.engine, self._stats(), message.limit))
            case WatchAgents():
                self.outbox.send(report_agents(self.engine, self._stats(), message.limit))
            case WatchRounds():
                rounds = self.engine.rounds
                recent = [] if rounds is None else rounds.recent(message.limit)
                self.outbox.send(RoundsReport(self._stats(), recent))
            case Tell():
                self._tell(message)
            case Shutdown():
                self.stop()

    def _add(self, message: Submit) -> None:
        """Hand a request to the engine, or refuse it: what is wrong with one must not end the others."""
        try:
            self.engine.add(self._request(message))
            return
        except RequestError as error:
            reason, field, status = str(error), error.field or "", error.status
        except Exception as error:
            _log.exception("request %s could not be prepared", message.id)
            reason, field, status = f"the request could not be prepared: {error}", None, 500
        refusal = TokenOutput(
            message.id, [], FinishReason.ERROR.value, error=reason, error_field=field, error_status=status
        )
        self.outbox.send(StepOutputs([refusal]))

    def _tell(self, message: Tell) -> None:
        """News of a tool call: what comes of it, or why nothing does, to who waits to hear it."""
        try:
            told = Told(message.number, self.engine.agent_event(message.event))
        except RequestError as error:
            told = Told(message.number, None, str(error), error.field, error.status)
        if message.number:
            self.outbox.send(told)

    def _request(self, message: Submit) -> Request:
        now = self.engine.clock.now()
        try:
            prompt = np.array(message.prompt, dtype=np.int32)
        except OverflowError as error:
            raise RequestError("the prompt has a token id that is no 32-bit integer", field="prompt") from error
        return Request.create(
            message.id,
            prompt,
            message.params,
            arrival=now,
            eos_tokens=self.eos_tokens,
            tenant=message.tenant,
            priority=message.priority,
            deadline=now + message.timeout,
            stream_rate=message.stream_rate,
            agent=message.agent,
            continues=message.continues,
            may_call=message.may_call,
            retain_seconds=message.retain_seconds,
            segments=message.segments,
            round=message.round,
        )

    def _send(self, outputs: list[TokenOutput], *, force_stats: bool = False) -> None:
        now = time.monotonic()
        stats = None
        if force_stats or now >= self._stats_due:
            stats, self._stats_due = self._stats(), now + _STATS_INTERVAL
        if outputs or stats:
            self.outbox.send(StepOutputs(outputs, stats))

    def _stats(self) -> EngineStats:
        engine, pool, totals = self.engine, self.engine.cache.pool, self.engine.counters
        return EngineStats(
            waiting=len(engine.waiting),
            running=len(engine.running),
            blocks_free=pool.num_free,
            blocks_active=pool.num_active,
            blocks_cached=pool.num_cached,
            preemptions=totals.preemptions,
            prefix_queries=engine.cache.queried_tokens,
            prefix_hits=engine.cache.hit_tokens,
            prompt_tokens=totals.prompt_tokens,
            output_tokens=totals.output_tokens,
            steps=totals.steps,
            step_seconds=totals.step_seconds,
            forward_seconds=engine.executor.forward_seconds,
            drafted_tokens=totals.drafted_tokens,
            accepted_tokens=totals.accepted_tokens,
            loads=totals.loads,
            loading=len(engine.loading),
            agents=agent_stats(engine),
            rounds=None if engine.rounds is None else engine.rounds.facts(),
            **_tier_stats(engine.tiers),
        )


class Outbox:
    """Encodes and pushes messages to the API process, in a thread of its own.

    The news of one step leave while the next one computes: a forward pass needs no Python, so the thread runs beside
    it. Only this thread touches the socket, and it never touches the engine. So nothing can end a request, or
    give its blocks to another, while a forward pass still writes them: all that does runs between two passes.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._messages: queue.SimpleQueue[FromEngine | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._push_all, name="outbox", daemon=True)
        self._thread.start()

    def send(self, message: FromEngine) -> None:
        """Hand over a message, which must not change any more. Never waits."""
        if not self._thread.is_alive():
            raise KvarnError("the thread that sends to the API process has ended; its error is in the log above")
        self._messages.put(message)

    def close(self) -> None:
        """Push what is left and end the thread."""
        self._messages.put(None)
        self._thread.join()

    def _push_all(self) -> None:
        encoder = msgspec.msgpack.Encoder()
        while (message := self._messages.get()) is not None:
            self._socket.send(encoder.encode(message))


def _tier_stats(tiers: Tiers | None) -> dict[str, Any]:
    if tiers is None:
        return {}
    counters, block_bytes = tiers.counters, tiers.block_bytes
    stats = {
        "host_blocks": tiers.host.num_slots,
        "host_blocks_used": tiers.host.num_entries,
        "to_host_bytes": counters.written_blocks * block_bytes,
        "from_host_bytes": counters.read_blocks * block_bytes,
        "failed_copies": counters.failed_copies,
        "to_host_rate": _rate(counters.written_blocks, block_bytes, tiers.block_seconds[Direction.TO_HOST]),
        "from_host_rate": _rate(counters.read_blocks, block_bytes, tiers.block_seconds[Direction.TO_DEVICE]),
    }
    disk = tiers.disk
    if disk is not None and disk.is_on:
        stats |= {
            "disk_blocks": disk.index.num_records,
            "disk_blocks_used": disk.index.num_entries,
            "to_disk_bytes": disk.written_blocks * block_bytes,
            "from_disk_bytes": disk.read_blocks * block_bytes,
            "bad_disk_blocks": disk.bad_blocks,
            "to_disk_rate": _rate(disk.written_blocks, block_bytes, disk.write_block_seconds),
            "from_disk_rate": _rate(disk.read_blocks, block_bytes, disk.block_seconds),
        }
    return stats


def _rate(blocks: int, block_bytes: int, block_seconds: float) -> float:
    """Bytes a second, once a block has been copied."""
    return block_bytes / block_seconds if blocks else 0.0


def _to_outputs(emissions: list[Emission]) -> list[TokenOutput]:
    """One output for each request: tokens that a request got in one step stand side by side."""
    outputs: list[TokenOutput] = []
    for emission in emissions:
        output = _to_output(emission)
        if outputs and outputs[-1].id == output.id:
            outputs[-1].tokens += output.tokens
            outputs[-1].finish_reason, outputs[-1].error = output.finish_reason, output.error
            if outputs[-1].logprobs is not None and output.logprobs is not None:
                outputs[-1].logprobs += output.logprobs
        else:
            outputs.append(output)
    return outputs


def _to_output(emission: Emission) -> TokenOutput:
    request = emission.request
    return TokenOutput(
        id=request.id,
        tokens=[] if emission.token is None else [emission.token],
        finish_reason=None if emission.finish_reason is None else emission.finish_reason.value,
        logprobs=None if emission.logprobs is None else [emission.logprobs],
        cached_tokens=request.cached_tokens,
        reused_tokens=request.reused_tokens,
        error=emission.error,
    )


def _end_with_parent() -> None:
    """Exit at once when standard input closes: the parent is gone and nobody waits for our tokens."""

    def watch() -> None:
        # Not through sys.stdin: a thread blocked in its buffer makes the interpreter's exit abort.
        while os.read(0, 1):
            pass
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _ready(loaded: LoadedEngine, device: str, seconds: float) -> Ready:
    engine = loaded.engine
    return Ready(
        max_context=engine.max_context,
        vocab_size=engine.vocab_size,
        num_blocks=engine.cache.pool.num_blocks,
        block_size=engine.cache.block_size,
        device=device,
        precision=loaded.spec.precision,
        kv_dtype=str(loaded.kv_dtype).removeprefix("torch."),
        load_seconds=seconds,
        reuse="exact" if engine.rounds is None else engine.rounds.settings.mode,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="The engine process of kvarn serve; started by it, not by hand.")
    parser.add_argument("--to-engine", required=True, help="ZeroMQ endpoint to pull messages from")
    parser.add_argument("--from-engine", required=True, help="ZeroMQ endpoint to push messages to")
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s engine %(levelname)s %(message)s")
    faulthandler.enable()  # a crash in native code leaves the stack it came from
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the API process, which drains first

    context = zmq.Context()
    inbox, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.connect(arguments.to_engine)
    push.connect(arguments.from_engine)
    outbox = Outbox(push)
    started = time.monotonic()
    wait_gently()
    try:
        config = msgspec.json.decode(arguments.config, type=EngineConfig)
        outbox.send(Loading("starting", 0.0))
        from kvarn.serving.assemble import load_engine  # imports torch: seconds, in which the parent sees "starting"

        loaded = load_engine(config, progress=lambda stage, fraction: outbox.send(Loading(stage, fraction)))
    except KvarnError as error:
        outbox.send(StartFailed(str(error)))
        outbox.close()
        context.destroy(linger=1000)
        return 2
    engine = loaded.engine
    outbox.send(_ready(loaded, config.device, time.monotonic() - started))
    settle()
    process = EngineProcess(engine, loaded.spec.eos_tokens, inbox, outbox)
    signal.signal(signal.SIGTERM, lambda *_: process.stop())
    process.run()
    engine.close()
    outbox.close()
    context.destroy(linger=1000)
    return 0


if __name__ == "__main__":
    sys.exit(main())
