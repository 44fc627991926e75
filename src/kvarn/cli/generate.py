"""`kvarn generate`: text from a model without a server, for one prompt or a file of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from kvarn.cli.loading import LoadingDisplay
from kvarn.cli.options import MODEL_HELP, CacheDType, CacheMemory, Device, Precision
from kvarn.cli.sizes import parse_bytes
from kvarn.errors import KvarnError

if TYPE_CHECKING:
    from kvarn.models.tokenizer import Tokenizer
    from kvarn.serving.engine import Emission
    from kvarn.serving.offline import Generation, OfflineEngine


def generate(
    prompt: Annotated[str, typer.Argument(help='The prompt; "-" reads standard input.')] = "",
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = "smollm2",
    file: Annotated[Path | None, typer.Option(help="One prompt a line, all generated in one batch.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Same seed, same text; -1: random.")] = -1,
    precision: Precision = "auto",
    kv_dtype: CacheDType = "auto",
    device: Device = "cpu",
    kv_memory: CacheMemory = "0",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt.")] = False,
) -> None:
    """Generate from PROMPT with a model in this process."""
    from kvarn.models.chat import ChatTemplate
    from kvarn.models.tokenizer import Tokenizer
    from kvarn.serving.offline import OfflineEngine
    from kvarn.serving.sampling.params import SamplingParams

    texts = _prompts(prompt, file)
    with LoadingDisplay(Console(stderr=True), quiet=as_json) as display:
        engine = OfflineEngine.load(
            model, progress=display.update, precision=precision, kv_dtype=kv_dtype, device=device,
            kv_memory_bytes=parse_bytes(kv_memory, "--kv-memory"),
        )  # fmt: skip
    tokenizer = Tokenizer.load(engine.folder)
    if not raw:
        template = ChatTemplate.load(engine.folder)
        texts = [template.render([{"role": "user", "content": text}]) for text in texts]
    prompts = [tokenizer.encode(text, add_special_tokens=raw) for text in texts]
    params = [
        SamplingParams(
            temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, max_tokens=_room(engine, tokens, max_tokens)
        )
        for tokens in prompts
    ]
    printer = _StreamPrinter(tokenizer, prompts[0]) if len(prompts) == 1 and not as_json else None
    results = engine.generate(prompts, params, on_token=printer.on_token if printer else None)
    if printer is not None:
        printer.finish()
    else:
        for tokens, result in zip(prompts, results, strict=True):
            record = _record(tokenizer, tokens, result)
            print(json.dumps(record, ensure_ascii=False) if as_json else record["text"] + "\n")
    errors = dict.fromkeys(result.error for result in results if result.error)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        raise typer.Exit(1)


def _prompts(prompt: str, file: Path | None) -> list[str]:
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise KvarnError(f"--file {file} cannot be read: {error}") from error
        texts = [line for line in lines if line.strip()]
    else:
        texts = [sys.stdin.read()] if prompt == "-" else [prompt]
    if not any(texts):
        raise KvarnError('there is no prompt: give one, "-" for standard input, or --file')
    return texts


def _room(engine: OfflineEngine, tokens: list[int], max_tokens: int) -> int:
    """As many tokens as were asked for, as far as the context has room; the engine refuses a prompt that has none."""
    return max(1, min(max_tokens, engine.engine.max_context - len(tokens)))


def _record(tokenizer: Tokenizer, prompt: list[int], result: Generation) -> dict[str, Any]:
    decoder = tokenizer.incremental_decoder(context=prompt)
    times = result.token_times
    return {
        "text": decoder.push(result.token_ids) + decoder.flush(),
        "finish_reason": result.finish_reason,
        "error": result.error,
        "prompt_tokens": len(prompt),
        "output_tokens": len(result.token_ids),
        "ttft_seconds": times[0] if times else None,
        "seconds": times[-1] if times else None,
    }


class _StreamPrinter:
    """Prints text as tokens come."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        self._decoder = tokenizer.incremental_decoder(context=prompt)

    def on_token(self, index: int, emission: Emission) -> None:
        if emission.token is not None:
            print(self._decoder.push([emission.token]), end="", flush=True)

    def finish(self) -> None:
        print(self._decoder.flush())
