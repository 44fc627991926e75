"""Keeps an engine process alive: spawns it, relays its start-up, notices its death, starts the next one.

What comes out is `link` (an `EngineLink` while an engine is ready, else None) and `wait_ready`. When a process
dies its requests fail at once with EngineDead and a successor is started after a growing pause. Only the very
first start may fail for good: then the model or the machine is wrong, not the moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import Callable

import msgspec

from kvarn.errors import EngineDead, KvarnError
from kvarn.models.sources import Progress
from kvarn.serving.api.config import ServerConfig
from kvarn.serving.api.engine_client import EngineLink
from kvarn.serving.api.errors import Unavailable
from kvarn.serving.api.messages import (
    AgentsReport,
    EngineStats,
    Loading,
    Ready,
    RoundsReport,
    StartFailed,
    StepOutputs,
    StreamsReport,
    Told,
)

_log = logging.getLogger(__name__)

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 30.0
HEALTHY_AFTER = 60.0
"""Seconds of life after which a death is taken as a single event and the pause starts anew."""
GOODBYE_SECONDS = 3.0


class EngineSupervisor:
    """One engine process at a time. `run` is its life; everything else may be called from any task of the loop."""

    def __init__(
        self,
        config: ServerConfig,
        *,
        on_progress: Progress = lambda stage, fraction: None,
        on_stats: Callable[[EngineStats], None] = lambda stats: None,
        on_up: Callable[[bool], None] = lambda up: None,
    ) -> None:
        self._config = config
        self._on_progress = on_progress
        self._on_stats = on_stats
        self._on_up = on_up
        self._changed = asyncio.Event()
        self._stopping = False
        self._process: subprocess.Popen[bytes] | None = None
        self.link: EngineLink | None = None
        self.first_ready = asyncio.Event()
        self.waiters = 0
        """Requests waiting for an engine to become ready."""

    async def run(self) -> None:
        """Keep an engine running until `stop`. Raises KvarnError when the first one cannot start."""
        pause = FIRST_PAUSE
        clock = asyncio.get_running_loop().time
        while not self._stopping:
            began = clock()
            failure = await self._one_life()
            if self._stopping:
                return
            if not self.first_ready.is_set():
                raise KvarnError(failure)
            pause = FIRST_PAUSE if clock() - began > HEALTHY_AFTER else pause
            _log.error("%s; starting another engine process in %.1f s", failure, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def wait_ready(self) -> EngineLink:
        """The link to a ready engine, waiting `restart_wait` seconds for one. Raises Unavailable."""
        if self.link is not None:
            return self.link
        if self._stopping or self.waiters >= self._config.max_queued:
            raise Unavailable("no engine is ready to serve; try again soon", retry_after=2)
        self.waiters += 1
        try:
            async with asyncio.timeout(self._config.restart_wait):
                while self.link is None:
                    await self._changed.wait()
                    if self._stopping:
                        break
        except TimeoutError:
            pass
        finally:
            self.waiters -= 1
        if self.link is None:
            raise Unavailable("the engine is starting and not ready yet; try again soon", retry_after=2)
        return self.link

    async def stop(self) -> None:
        """End the engine process: ask, wait a little, kill."""
        self._stopping = True
        self._changed.set()
        process = self._process
        if process is None:
            return
        if self.link is None:
            process.kill()  # still loading: there is nothing to say goodbye to
        else:
            self.link.shut_down()
        try:
            await asyncio.to_thread(process.wait, GOODBYE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()

    def kill(self) -> None:
        """End the engine process without a goodbye."""
        self._stopping = True
        if self._process is not None:
            self._process.kill()

    async def _one_life(self) -> str:
        """Start a process and relay what it says until it ends; the reason it ended."""
        link = EngineLink()
        try:
            process = self._process = self._spawn(link)
        except OSError as failure:  # no memory for a process, or no such program
            link.close()
            return f"the engine process cannot be started: {failure.strerror}"
        # A thread waits for the end: it works in any thread and on any platform, unlike asyncio's child watchers.
        ended = asyncio.ensure_future(asyncio.to_thread(process.wait))
        listening = asyncio.ensure_future(self._listen(link))
        try:
            await asyncio.wait({ended, listening}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                # Its last words (StartFailed) may still be on their way through the socket.
                await asyncio.wait({listening}, timeout=0.2)
            if listening.done():
                error = listening.exception()
                return listening.result() if error is None else f"the engine cannot be understood: {error!r}"
            return _epitaph(process.returncode)
        finally:
            self._mark_down(link)
            process.kill()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            await ended
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
            self._process = None
            link.close()

    def _spawn(self, link: EngineLink) -> subprocess.Popen[bytes]:
        command = [
            *self._config.engine_command,
            *("--to-engine", link.to_engine, "--from-engine", link.from_engine),
            *("--config", msgspec.json.encode(self._config.engine).decode()),
        ]
        # A session of its own: Ctrl-C reaches the server alone, which lets requests finish first. Should the server
        # die, the engine sees the end of its standard input.
        new_session = {"start_new_session": True} if os.name == "posix" else {}
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=2, **new_session)  # type: ignore[call-overload,no-any-return]

    async def _listen(self, link: EngineLink) -> str:
        """Handle the engine's messages; returns only when it says that it cannot start."""
        while True:
            match await link.receive():
                case StepOutputs() as step:
                    link.deliver(step)
                    if step.stats is not None:
                        self._on_stats(step.stats)
                case StreamsReport() | AgentsReport() | RoundsReport() as report:
                    link.note_report(report)
                case Told() as told:
                    link.note_told(told)
                case Loading(stage, fraction):
                    self._on_progress(stage, fraction)
                case Ready() as ready:
                    self._mark_up(link, ready)
                case StartFailed(message):
                    return message

    def _mark_up(self, link: EngineLink, ready: Ready) -> None:
        link.ready = ready
        self.link = link
        self.first_ready.set()
        self._on_up(True)
        self._changed.set()

    def _mark_down(self, link: EngineLink) -> None:
        if self.link is link:
            self.link = None
            self._changed.clear()
            self._on_up(False)
        link.fail_all(EngineDead("the engine process ended while this request was running; send it again"))


def _epitaph(status: int) -> str:
    """What to say of an engine process that ended without a word; negative numbers are signals."""
    if status == -signal.SIGKILL:
        return (
            "the engine process was killed, most often because memory ran out (--kv-memory and --max-running need less)"
        )
    if status < 0:
        return f"the engine process was ended by signal {-status}; what it wrote before says where"
    return f"the engine process ended with exit status {status}; what it wrote before says why"
