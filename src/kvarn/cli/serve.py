"""`kvarn serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kvarn.cli.loading import LoadingDisplay
from kvarn.cli.sizes import parse_bytes
from kvarn.errors import KvarnError
from kvarn.serving.api.config import ServerConfig
from kvarn.serving.config import EngineConfig, KVDType, PolicyName, PrecisionChoice, Speculation

_ENGINE, _LIMITS, _SERVER = "Engine", "Limits", "Server"


def serve(
    model: Annotated[
        str, typer.Argument(help="smollm2, a Hugging Face folder, a .gguf file, or a hub id.")
    ] = "smollm2",
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel=_SERVER)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.", rich_help_panel=_SERVER)] = 8000,
    served_name: Annotated[
        str, typer.Option(help="Model name that clients use [dim](default: the model's)[/].", rich_help_panel=_SERVER)
    ] = "",
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Accept only requests with this bearer key; repeatable.", rich_help_panel=_SERVER),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="File with one API key a line (also: KVARN_API_KEYS, comma separated).", rich_help_panel=_SERVER
        ),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Append one JSON line per finished request.", rich_help_panel=_SERVER)
    ] = None,
    record_content: Annotated[
        bool, typer.Option("--record-content", help="Record token ids (the text!) as well.", rich_help_panel=_SERVER)
    ] = False,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log every HTTP request.", rich_help_panel=_SERVER)
    ] = False,
    precision: Annotated[
        PrecisionChoice,
        typer.Option(help="Of the weights: auto, float32, bfloat16, int8 or int4.", rich_help_panel=_ENGINE),
    ] = "auto",
    kv_dtype: Annotated[
        KVDType, typer.Option(help="Of cached keys and values: auto, bfloat16 or int8.", rich_help_panel=_ENGINE)
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...", rich_help_panel=_ENGINE)] = "cpu",
    policy: Annotated[PolicyName, typer.Option(help="Scheduling policy.", rich_help_panel=_ENGINE)] = "fcfs",
    threads: Annotated[
        int, typer.Option(help="Compute threads; 0: all processors allowed to us.", rich_help_panel=_ENGINE)
    ] = 0,
    kv_memory: Annotated[
        str,
        typer.Option(
            help="Memory of the KV cache, such as 2GiB; 0: a quarter of free memory.", rich_help_panel=_ENGINE
        ),
    ] = "0",
    block_size: Annotated[int, typer.Option(help="Tokens in a KV block.", rich_help_panel=_ENGINE)] = 16,
    token_budget: Annotated[
        int, typer.Option(help="Tokens computed per step; longer prompts go in chunks.", rich_help_panel=_ENGINE)
    ] = EngineConfig.__struct_defaults__[EngineConfig.__struct_fields__.index("token_budget")],
    prefill_budget: Annotated[
        int, typer.Option(help="Prompt tokens in a step that others' readers wait for.", rich_help_panel=_ENGINE)
    ] = EngineConfig.__struct_defaults__[EngineConfig.__struct_fields__.index("prefill_budget")],
    speculation: Annotated[
        Speculation,
        typer.Option(help="Draft where text repeats: off, ngram, auto (where it pays).", rich_help_panel=_ENGINE),
    ] = "auto",
    draft_tokens: Annotated[int, typer.Option(help="Tokens drafted at a time at most.", rich_help_panel=_ENGINE)] = 8,
    prefix_cache: Annotated[
        bool, typer.Option(help="Reuse the KV cache of equal prefixes.", rich_help_panel=_ENGINE)
    ] = True,
    max_context: Annotated[
        int, typer.Option(help="Tokens of prompt + output; 0: the model's.", rich_help_panel=_LIMITS)
    ] = 0,
    max_running: Annotated[int, typer.Option(help="Requests in one batch.", rich_help_panel=_LIMITS)] = 128,
    max_queued: Annotated[
        int, typer.Option(help="Requests that may wait before others get 429.", rich_help_panel=_LIMITS)
    ] = 512,
    max_concurrent: Annotated[int, typer.Option(help="Requests in flight at once.", rich_help_panel=_LIMITS)] = 1024,
    max_body: Annotated[str, typer.Option(help="Largest request body.", rich_help_panel=_LIMITS)] = "16MiB",
    request_timeout: Annotated[
        float, typer.Option(help="Seconds after which a request is given up.", rich_help_panel=_LIMITS)
    ] = 600.0,
    drain_seconds: Annotated[
        float, typer.Option(help="Seconds that running requests get to finish after SIGTERM.", rich_help_panel=_LIMITS)
    ] = 30.0,
) -> None:
    """Serve MODEL to any OpenAI client.

    With no argument this serves the bundled SmolLM2-135M-Instruct on http://127.0.0.1:8000/v1.
    """
    from kvarn.serving.api.server import run_server

    config = ServerConfig(
        engine=EngineConfig(
            model=model, precision=precision, kv_dtype=kv_dtype, device=device, policy=policy,
            max_context=max_context, max_running=max_running,
            token_budget=token_budget, block_size=block_size, kv_memory_bytes=parse_bytes(kv_memory, "--kv-memory"),
            share_prefixes=prefix_cache, threads=threads, prefill_budget=prefill_budget,
            speculation=speculation, draft_tokens=draft_tokens,
        ),
        host=host, port=port, served_name=served_name, api_keys=_api_keys(api_key or [], api_key_file),
        max_body_bytes=parse_bytes(max_body, "--max-body"), max_queued=max_queued, max_concurrent=max_concurrent,
        request_timeout=request_timeout, drain_seconds=drain_seconds, record=record, record_content=record_content,
        access_log=access_log,
    )  # fmt: skip
    config.validate()
    console = Console(stderr=True, highlight=False)
    with LoadingDisplay(console) as display:
        code = run_server(config, on_progress=display.update, on_ready=display.ready)
    sys.exit(code)


def _api_keys(keys: list[str], file: Path | None) -> tuple[str, ...]:
    """Keys of the options, the file and the environment."""
    keys = keys + [key for key in os.environ.get("KVARN_API_KEYS", "").split(",") if key.strip()]
    if file is not None:
        try:
            keys += file.read_text().split()
        except OSError as error:
            raise KvarnError(f"--api-key-file {file} cannot be read: {error.strerror}") from error
        if not keys:
            raise KvarnError(f"--api-key-file {file} has no keys; write one a line")
    return tuple(key.strip() for key in keys)
