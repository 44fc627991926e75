"""`kvarn serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvarn.cli.loading import LoadingDisplay
from kvarn.cli.options import ENGINE_PANEL, CacheDType, CacheMemory, Device, Model, Precision
from kvarn.cli.sizes import parse_bytes
from kvarn.errors import KvarnError
from kvarn.serving.api.config import ServerConfig
from kvarn.serving.config import AUTO, EngineConfig, PolicyName, Reuse, Speculation

_ENGINE = EngineConfig()
_SERVER = ServerConfig()


def _option(panel: str) -> Callable[..., Any]:
    return partial(typer.Option, rich_help_panel=panel)


_server, _engine, _limits = _option("Server"), _option(ENGINE_PANEL), _option("Limits")


def serve(
    model: Model = _ENGINE.model,
    host: Annotated[str, _server(help="Address to listen on.")] = _SERVER.host,
    port: Annotated[int, _server(help="Port to listen on; 0 picks a free one.")] = _SERVER.port,
    served_name: Annotated[str, _server(help="Model name that clients use [dim](default: the model's)[/].")] = "",
    api_key: Annotated[list[str] | None, _server(help="Accept only requests with this bearer key; repeatable.")] = None,
    api_key_file: Annotated[
        Path | None,
        _server(
            help="File with one API key a line, and behind it, if it has one, the stream rate that its readers are "
            "believed at most (keys also: KVARN_API_KEYS, comma separated)."
        ),
    ] = None,
    record: Annotated[Path | None, _server(help="Append one JSON line per finished request.")] = None,
    record_content: Annotated[bool, _server("--record-content", help="Record token ids (the text!) as well.")] = False,
    stream_rate: Annotated[
        float, _server(help="Tokens a second that a reader takes who does not say (stream_rate, X-Stream-Rate).")
    ] = _SERVER.default_stream_rate,
    max_stream_rate: Annotated[
        float, _server(help="The fastest that readers are believed to be, where their key has no limit of its own.")
    ] = _SERVER.max_stream_rate,
    pace: Annotated[bool, _server("--pace", help="Send tokens as they are read, not as they are made.")] = False,
    segment_separator: Annotated[
        str, _server(help="Text that divides plain prompts into private text, shared segments and the task.")
    ] = _SERVER.segment_separator,
    access_log: Annotated[bool, _server("--access-log", help="Log every HTTP request.")] = False,
    precision: Precision = _ENGINE.precision,
    kv_dtype: CacheDType = _ENGINE.kv_dtype,
    device: Device = _ENGINE.device,
    policy: Annotated[PolicyName, _engine(help="Scheduling policy.")] = _ENGINE.policy,
    policy_option: Annotated[
        list[str] | None, _engine(help="Setting of streaming or agentic, like tick=0.5; may be repeated.")
    ] = None,
    threads: Annotated[int, _engine(help="Compute threads; 0: all processors allowed to us.")] = _ENGINE.threads,
    kv_memory: CacheMemory = "0",
    host_memory: Annotated[
        str, _engine(help="Memory for KV that the KV cache has no room for, such as 4GiB; auto: what the policy needs.")
    ] = "auto",
    disk_cache: Annotated[
        str, _engine(help="Folder that keeps KV for the next start [dim](default: none)[/].")
    ] = _ENGINE.disk_cache,
    disk_memory: Annotated[str, _engine(help="What it may take, such as 4GiB.")] = "4GiB",
    block_size: Annotated[int, _engine(help="Tokens in a KV block.")] = _ENGINE.block_size,
    token_budget: Annotated[int, _engine(help="Tokens a step; longer prompts go in chunks.")] = _ENGINE.token_budget,
    prefill_budget: Annotated[int, _engine(help="Prompt tokens that readers may wait for.")] = _ENGINE.prefill_budget,
    speculation: Annotated[
        Speculation, _engine(help="Draft where text repeats: off, ngram, auto (where it pays).")
    ] = _ENGINE.speculation,
    draft_tokens: Annotated[int, _engine(help="Tokens drafted at a time at most.")] = _ENGINE.draft_tokens,
    prefix_cache: Annotated[bool, _engine(help="Reuse the KV cache of equal prefixes.")] = _ENGINE.share_prefixes,
    reuse: Annotated[
        Reuse,
        _engine(
            help="Of shared segments behind different texts: exact (prefixes alone), serial, batched, collective, "
            "lego; auto: what the model is certified for."
        ),
    ] = _ENGINE.reuse,
    reuse_share: Annotated[
        float, _engine(help="Share of reused tokens computed anew where they stand; 0: as certified, or 0.15.")
    ] = _ENGINE.reuse_share,
    round_wait: Annotated[
        float, _engine(help="Seconds that a round waits for those of its requests that have not come.")
    ] = _ENGINE.round_wait,
    segment_memory: Annotated[
        str, _engine(help="Host memory for shared segments, such as 1GiB; auto: a quarter of the KV cache's.")
    ] = "auto",
    mirror_memory: Annotated[
        str, _engine(help="Memory for what requests with shared segments leave; auto: as --segment-memory, 0: none.")
    ] = "auto",
    max_context: Annotated[int, _limits(help="Tokens of prompt + output; 0: the model's.")] = _ENGINE.max_context,
    max_running: Annotated[int, _limits(help="Requests in one batch.")] = _ENGINE.max_running,
    max_queued: Annotated[int, _limits(help="Requests that may wait before others get 429.")] = _SERVER.max_queued,
    max_concurrent: Annotated[int, _limits(help="Requests in flight at once.")] = _SERVER.max_concurrent,
    max_body: Annotated[str, _limits(help="Largest request body.")] = "16MiB",
    request_timeout: Annotated[float, _limits(help="Seconds a request may take.")] = _SERVER.request_timeout,
    drain_seconds: Annotated[float, _limits(help="Seconds to finish requests after SIGTERM.")] = _SERVER.drain_seconds,
) -> None:
    """Serve MODEL to any OpenAI client.

    With no argument this serves the bundled SmolLM2-135M-Instruct on http://127.0.0.1:8000/v1.
    """
    from kvarn.serving.api.server import run_server

    keys, limits = _api_keys(api_key or [], api_key_file)
    config = ServerConfig(
        engine=EngineConfig(
            model=model, precision=precision, kv_dtype=kv_dtype, device=device, policy=policy,
            policy_options=tuple(policy_option or ()),
            max_context=max_context, max_running=max_running,
            token_budget=token_budget, block_size=block_size, kv_memory_bytes=parse_bytes(kv_memory, "--kv-memory"),
            host_memory_bytes=AUTO if host_memory == "auto" else parse_bytes(host_memory, "--host-memory"),
            disk_cache=disk_cache, disk_memory_bytes=parse_bytes(disk_memory, "--disk-memory"),
            share_prefixes=prefix_cache, threads=threads, prefill_budget=prefill_budget,
            speculation=speculation, draft_tokens=draft_tokens,
            reuse=reuse, reuse_share=reuse_share, round_wait=round_wait,
            segment_memory_bytes=AUTO if segment_memory == "auto" else parse_bytes(segment_memory, "--segment-memory"),
            mirror_memory_bytes=AUTO if mirror_memory == "auto" else parse_bytes(mirror_memory, "--mirror-memory"),
        ),
        host=host, port=port, served_name=served_name, api_keys=keys, stream_rate_limits=limits,
        default_stream_rate=stream_rate, max_stream_rate=max_stream_rate, pace=pace,
        max_body_bytes=parse_bytes(max_body, "--max-body"), max_queued=max_queued, max_concurrent=max_concurrent,
        request_timeout=request_timeout, drain_seconds=drain_seconds, record=record, record_content=record_content,
        access_log=access_log, segment_separator=segment_separator,
    )  # fmt: skip
    config.validate()
    console = Console(stderr=True, highlight=False)
    with LoadingDisplay(console) as display:
        code = run_server(config, on_progress=display.update, on_ready=display.ready)
    sys.exit(code)


def _api_keys(keys: list[str], file: Path | None) -> tuple[tuple[str, ...], dict[str, float]]:
    """Keys of the options, the environment and the file; and the stream rates that the file gives some of them."""
    keys = keys + [key for key in os.environ.get("KVARN_API_KEYS", "").split(",") if key.strip()]
    limits: dict[str, float] = {}
    if file is not None:
        try:
            lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
        except OSError as error:
            raise KvarnError(f"--api-key-file {file} cannot be read: {error.strerror}") from error
        for number, (key, *rest) in enumerate(lines, 1):
            keys.append(key)
            if rest:
                limits[key] = _rate(rest, f"--api-key-file {file}, key {number}")
        if not keys:
            raise KvarnError(f"--api-key-file {file} has no keys; write one a line")
    return tuple(key.strip() for key in keys), limits


def _rate(words: list[str], where: str) -> float:
    try:
        (word,) = words
        return float(word)
    except ValueError as error:
        raise KvarnError(f"{where}: expected nothing or one number behind the key, tokens per second") from error
