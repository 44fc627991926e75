"""Runs the API process: port first, then the engine, then requests, until a signal says stop.

The first SIGTERM or SIGINT drains: new requests get 503, running ones `drain_seconds` to finish. A second one
ends everything at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import uvicorn

from kvarn.errors import CapacityError, KvarnError
from kvarn.models.sources import Progress, resolve
from kvarn.serving.api.app import make_app
from kvarn.serving.api.config import ServerConfig
from kvarn.serving.api.metrics import Metrics
from kvarn.serving.api.recorder import Recorder
from kvarn.serving.api.service import Service
from kvarn.serving.api.supervisor import EngineSupervisor
from kvarn.serving.api.text import ModelText
from kvarn.serving.settle import settle

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_FORCED = 1
"""Exit code after a second signal."""


def run_server(
    config: ServerConfig,
    on_progress: Progress = lambda stage, fraction: None,
    on_ready: Callable[[str], None] = lambda message: None,
) -> int:
    """Serve until a signal; the exit code. Prints nothing.

    `on_progress(stage, fraction)` hears of loading, from several threads; `on_ready(message)` once requests are
    served. Raises KvarnError for impossible settings, CapacityError when the port is taken or memory is short,
    ModelError when the model cannot be loaded.
    """
    config.validate()
    listener = _bind(config.host, config.port)
    with contextlib.closing(listener), asyncio.Runner(loop_factory=_new_loop) as runner:
        return runner.run(_run(config, on_progress, on_ready, listener))


async def _run(
    config: ServerConfig, on_progress: Progress, on_ready: Callable[[str], None], listener: socket.socket
) -> int:
    return await _Server(config, on_progress, on_ready).run(listener)


def _bind(host: str, port: int) -> socket.socket:
    """Take the port before anything slow happens, and hold it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise KvarnError(f"cannot listen on host {host!r}: {error.strerror}; try 127.0.0.1 or 0.0.0.0") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise CapacityError(
            f"cannot listen on {host}:{port}: {error.strerror}; stop what uses the port, or choose another (--port)"
        ) from error
    return listener


class _Uvicorn(uvicorn.Server):
    """uvicorn without its signal handlers: it would close the door at once, and drained clients could not be told."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Server:
    """One run of the server."""

    def __init__(self, config: ServerConfig, on_progress: Progress, on_ready: Callable[[str], None]) -> None:
        self._config = config
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._metrics = Metrics()
        self._supervisor = EngineSupervisor(
            config,
            on_progress=on_progress,
            on_stats=self._metrics.engine_stats,
            on_up=self._metrics.engine_is_up,
        )

    async def run(self, listener: socket.socket) -> int:
        self._listen_for_signals()
        recorder = self._recorder()
        engine = asyncio.create_task(self._supervisor.run())
        try:
            text = await self._unless_stopped(asyncio.create_task(asyncio.to_thread(self._load_text)), engine)
            if text is None:
                return 0
            service = Service(self._config, text, self._supervisor, self._metrics, recorder)
            return await self._serve(service, listener, engine)
        finally:
            if self._stop_now.is_set():
                self._supervisor.kill()
            await self._supervisor.stop()
            engine.cancel()
            await asyncio.gather(engine, return_exceptions=True)
            if recorder is not None:
                await asyncio.to_thread(recorder.close)

    async def _serve(self, service: Service, listener: socket.socket, engine: asyncio.Task[None]) -> int:
        uvicorn_config = uvicorn.Config(
            make_app(service),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=uvicorn.config.LOGGING_CONFIG if self._config.access_log else None,
            log_level="info" if self._config.access_log else "warning",
            access_log=self._config.access_log,
            server_header=False,
            timeout_graceful_shutdown=3,
        )
        http = _Uvicorn(uvicorn_config)
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        announcing = asyncio.create_task(self._announce(listener))
        try:
            await self._unless_stopped(serving, engine)
            drained, told_again = asyncio.create_task(service.drain()), asyncio.create_task(self._stop_now.wait())
            await asyncio.wait({drained, told_again}, return_when=asyncio.FIRST_COMPLETED)
            told_again.cancel()
            drained.cancel()
            return _FORCED if self._stop_now.is_set() else 0
        finally:
            announcing.cancel()
            service.draining = True
            service.abort_all()
            http.force_exit = self._stop_now.is_set()
            http.should_exit = True
            await serving

    async def _unless_stopped(self, task: asyncio.Task[_Result], engine: asyncio.Task[None]) -> _Result | None:
        """The task's result; None when a signal came first. Raises what ended the engine for good."""
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, engine, stop}, return_when=asyncio.FIRST_COMPLETED)
            if engine.done():
                engine.result()
            return task.result() if task.done() else None
        finally:
            stop.cancel()

    def _load_text(self) -> ModelText:
        return ModelText.load(resolve(self._config.engine.model, progress=self._on_progress).folder)

    def _recorder(self) -> Recorder | None:
        config = self._config
        if config.record is None:
            return None
        return Recorder(config.record, block_size=config.engine.block_size, content=config.record_content)

    async def _announce(self, listener: socket.socket) -> None:
        await self._supervisor.first_ready.wait()
        link = self._supervisor.link
        settle()
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        what = ""
        if link is not None and (ready := link.ready) is not None:
            reuse = "" if ready.reuse == "exact" else f", {ready.reuse} reuse"
            what = f" ({ready.precision}, {ready.kv_dtype} cache, {ready.device}{reuse})"
        address = f"http://{shown}:{port}"
        self._on_ready(f"{self._config.model_name}{what} at {address}/v1\ndashboard at {address}/dashboard")

    def _listen_for_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                loop.add_signal_handler(number, self._on_signal)
            except NotImplementedError:  # loops of some platforms cannot
                signal.signal(number, lambda number, frame: loop.call_soon_threadsafe(self._on_signal))

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not made for every platform
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop
