"""How a server is set up: one frozen value, made from command-line flags, read by every part of the API process."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from kvarn.errors import KvarnError
from kvarn.serving.config import EngineConfig
from kvarn.serving.reader import DEFAULT_RATE, FASTEST, SLOWEST


@dataclass(frozen=True)
class ServerConfig:
    """Settings of one server. Times in seconds, sizes in bytes; a "sequence" is one of a request's n answers."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free port; `run_server` tells which through `on_ready`."""
    served_name: str = ""
    """The name clients send as `model`; empty: the engine's model name."""
    api_keys: tuple[str, ...] = ()
    """Accepted bearer keys; none: everyone may ask."""
    max_body_bytes: int = 16 * 1024 * 1024
    max_queued: int = 512
    """Sequences that may wait for their first token; beyond that requests are answered with 429."""
    max_concurrent: int = 1024
    """Sequences in flight at once, waiting or running."""
    default_max_tokens: int = 4096
    """Output tokens of a chat request that names no limit, at most what its context has room for."""
    default_stream_rate: float = DEFAULT_RATE
    """Tokens a second that a reader takes who does not say."""
    max_stream_rate: float = 200.0
    """The fastest a reader is believed to be, where his key has no limit of its own: the rate gives precedence."""
    stream_rate_limits: dict[str, float] = field(default_factory=dict)
    """API key -> the fastest its readers are believed to be."""
    pace: bool = False
    """Send tokens as they are read, `PACE_LEAD` seconds ahead, and not as they are made."""
    segment_separator: str = ""
    """What divides a plain prompt's text into segments; empty: nothing does."""
    request_timeout: float = 600.0
    restart_wait: float = 20.0
    """How long a request waits for an engine that is starting before it is answered with 503."""
    drain_seconds: float = 30.0
    """How long running requests may take to finish after SIGTERM."""
    record: Path | None = None
    """File that gets one JSON line a finished sequence."""
    record_content: bool = False
    """Also record prompt and output token ids (they are the content)."""
    access_log: bool = False
    engine_command: tuple[str, ...] = (sys.executable, "-m", "kvarn.serving.engine_process")

    @property
    def model_name(self) -> str:
        return self.served_name or self.engine.model

    def validate(self) -> None:
        """Raise KvarnError naming the first setting that cannot work."""
        self.engine.validate()
        if not 0 <= self.port <= 65535:
            raise KvarnError(f"port is {self.port}; expected 0 to 65535")
        for name in ("max_body_bytes", "max_queued", "max_concurrent", "default_max_tokens"):
            if getattr(self, name) < 1:
                raise KvarnError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if not self.request_timeout > 0:
            raise KvarnError(f"request_timeout is {self.request_timeout}; expected more than 0 seconds")
        rates = {"stream_rate, of readers who do not say,": self.default_stream_rate}
        rates["max_stream_rate"] = self.max_stream_rate
        if self.stream_rate_limits:
            rates |= {
                "the lowest stream rate of an API key": min(self.stream_rate_limits.values()),
                "the highest stream rate of an API key": max(self.stream_rate_limits.values()),
            }
        for name, rate in rates.items():
            if not SLOWEST <= rate <= FASTEST:
                raise KvarnError(f"{name} is {rate}; expected {SLOWEST:g} to {FASTEST:,.0f} tokens per second")
        if self.default_stream_rate > self.max_stream_rate:
            raise KvarnError(
                f"stream_rate is {self.default_stream_rate:g}, above max_stream_rate, {self.max_stream_rate:g}; "
                "nobody would be taken for so fast: lower it, or raise max_stream_rate"
            )
        for name in ("restart_wait", "drain_seconds"):
            if not getattr(self, name) >= 0:
                raise KvarnError(f"{name} is {getattr(self, name)}; expected 0 seconds or more")
        if any(not key for key in self.api_keys):
            raise KvarnError("an API key is empty; give each key at least one character")
