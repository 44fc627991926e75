"""Arguments that several commands have, written once: what they are called, accept and say of themselves."""

from __future__ import annotations

from typing import Annotated

import typer

from kvarn.serving.config import KVDType, PrecisionChoice

ENGINE_PANEL = "Engine"
MODEL_HELP = "smollm2, a Hugging Face folder, a .gguf file, or a hub id."

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Precision = Annotated[
    PrecisionChoice,
    typer.Option(
        help="Of the weights; auto: the fastest here that keeps them as their file has them.",
        rich_help_panel=ENGINE_PANEL,
    ),
]
CacheDType = Annotated[
    KVDType,
    typer.Option(
        help="Of cached keys and values; auto: int8 with weights of 8 or 4 bits, else as computed.",
        rich_help_panel=ENGINE_PANEL,
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...", rich_help_panel=ENGINE_PANEL)]
CacheMemory = Annotated[
    str,
    typer.Option(
        help="Memory of the KV cache, such as 2GiB; 0: a quarter of free memory.", rich_help_panel=ENGINE_PANEL
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar=["KVARN_API_KEY", "OPENAI_API_KEY"], help="API key, if the server wants one."),
]
