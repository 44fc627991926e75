"""What /metrics shows: latencies as readers feel them, and where the engine and its KV cache stand.

Latencies are taken in the API process, from the arrival of the HTTP request to news from the engine. Engine
totals come as `EngineStats` since the engine's start; a restarted engine counts from zero again, ours go on.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvarn.serving.api.agent_metrics import AgentMetrics
from kvarn.serving.api.messages import EngineStats
from kvarn.serving.api.round_metrics import RoundMetrics

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS: Final = (0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.4, 0.8, 2, 5)

_ENGINE_TOTALS: Final = (
    ("preemptions", "kvarn_preemptions", "Requests that gave their KV blocks back and were recomputed."),
    ("prefix_queries", "kvarn_prefix_queried_tokens", "Prompt tokens looked up in the prefix cache."),
    ("prefix_hits", "kvarn_prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    ("prompt_tokens", "kvarn_engine_prompt_tokens", "Prompt tokens computed by the engine."),
    ("output_tokens", "kvarn_engine_output_tokens", "Tokens sampled by the engine."),
    ("drafted_tokens", "kvarn_drafted_tokens", "Guesses at tokens to come that were computed."),
    ("accepted_tokens", "kvarn_accepted_tokens", "Guesses that came true."),
    ("loads", "kvarn_loads", "Requests whose KV was brought back from the host."),
    ("to_host_bytes", "kvarn_kv_to_host_bytes", "KV copied to host memory."),
    ("from_host_bytes", "kvarn_kv_from_host_bytes", "KV copied back from host memory."),
    ("to_disk_bytes", "kvarn_kv_to_disk_bytes", "KV written to the disk cache."),
    ("from_disk_bytes", "kvarn_kv_from_disk_bytes", "KV read from the disk cache."),
    ("bad_disk_blocks", "kvarn_kv_bad_disk_blocks", "Blocks in the disk cache that were torn or changed; dropped."),
    ("failed_copies", "kvarn_kv_failed_copies", "Copies of KV that failed; their content was computed again."),
    ("steps", "kvarn_engine_steps", "Engine steps."),
    ("step_seconds", "kvarn_engine_step_seconds", "Seconds spent in engine steps."),
    ("forward_seconds", "kvarn_engine_forward_seconds", "Seconds of those spent in the model's forward pass."),
)
"""(field of EngineStats, metric, help)"""


class Metrics:
    """All metrics in a registry of their own, so several servers can live in one process."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help, buckets=buckets, registry=registry)

        self.ttft = histogram(
            "kvarn_time_to_first_token_seconds", "From the request's arrival to its first token.", _SECONDS
        )
        self.tpot = histogram(
            "kvarn_time_per_output_token_seconds",
            "Mean seconds a token after the first, one value a sequence.",
            _TOKEN_SECONDS,
        )
        self.itl = histogram("kvarn_inter_token_latency_seconds", "Between two tokens of a sequence.", _TOKEN_SECONDS)
        self.e2e = histogram("kvarn_request_seconds", "From the request's arrival to its last token.", _SECONDS)
        self.requests = Counter(
            "kvarn_requests",
            "Generating requests that ended, by endpoint and outcome.",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self.errors = Counter("kvarn_http_errors", "Requests answered with an error.", ["status"], registry=registry)
        self.prompt_tokens = Counter("kvarn_prompt_tokens", "Prompt tokens of requests.", registry=registry)
        self.output_tokens = Counter("kvarn_output_tokens", "Tokens sent to clients.", registry=registry)
        self.engine_restarts = Counter(
            "kvarn_engine_restarts", "Engine processes started after the first.", registry=registry
        )
        self.engine_up = Gauge("kvarn_engine_up", "1 while the engine serves.", registry=registry)
        self.waiting = Gauge("kvarn_sequences_waiting", "Sequences in the engine's queue.", registry=registry)
        self.running = Gauge("kvarn_sequences_running", "Sequences the engine is computing.", registry=registry)
        self.loading = Gauge("kvarn_sequences_loading", "Sequences whose KV is being loaded.", registry=registry)
        self.blocks = Gauge("kvarn_kv_blocks", "KV cache blocks by state.", ["state"], registry=registry)
        self.host_blocks = Gauge("kvarn_kv_host_blocks", "Blocks of KV in host memory.", ["state"], registry=registry)
        self.disk_blocks = Gauge("kvarn_kv_disk_blocks", "Blocks of KV on disk.", ["state"], registry=registry)
        self.copy_rates = Gauge(
            "kvarn_kv_copy_bytes_per_second",
            "How fast KV has lately been copied, by link; only of links that were used.",
            ["link"],
            registry=registry,
        )
        self._totals = [(field, Counter(name, help, registry=registry)) for field, name, help in _ENGINE_TOTALS]
        self.agents = AgentMetrics(registry)
        self.rounds = RoundMetrics(registry)
        self._last = EngineStats()
        self._was_up = False

    def engine_stats(self, stats: EngineStats) -> None:
        self.waiting.set(stats.waiting)
        self.running.set(stats.running)
        self.loading.set(stats.loading)
        for state in ("free", "active", "cached"):
            self.blocks.labels(state).set(getattr(stats, f"blocks_{state}"))
        self.host_blocks.labels("used").set(stats.host_blocks_used)
        self.host_blocks.labels("free").set(stats.host_blocks - stats.host_blocks_used)
        self.disk_blocks.labels("used").set(stats.disk_blocks_used)
        self.disk_blocks.labels("free").set(stats.disk_blocks - stats.disk_blocks_used)
        for link in ("to_host", "from_host", "to_disk", "from_disk"):
            if rate := getattr(stats, f"{link}_rate"):
                self.copy_rates.labels(link).set(rate)
        for field, counter in self._totals:
            counter.inc(max(0, getattr(stats, field) - getattr(self._last, field)))
        self._last = stats
        if stats.agents is not None:
            self.agents.note(stats.agents)
        if stats.rounds is not None:
            self.rounds.note(stats.rounds)

    def engine_is_up(self, up: bool) -> None:
        if up and self._was_up:
            self.engine_restarts.inc()
        self._was_up |= up
        self.engine_up.set(up)
        self._last = EngineStats()
        self.agents.restart()
        self.rounds.restart()
        self.waiting.set(0)
        self.running.set(0)
        self.loading.set(0)

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)
