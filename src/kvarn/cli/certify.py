"""`kvarn model certify-reuse`: whether a model may read shared segments that were encoded elsewhere."""

from __future__ import annotations

import json
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from kvarn.cli.options import ENGINE_PANEL, AsJson, CacheDType, Device, Model, Precision
from kvarn.cli.runs import progress_bar
from kvarn.serving.config import EngineConfig
from kvarn.serving.quality.certificate import Certificate, Limits, Measured, write
from kvarn.serving.quality.figures import Quality

_LIMITS = Limits()
_QUICK = 3


def certify_reuse(
    model: Model,
    precision: Precision = "auto",
    kv_dtype: CacheDType = "auto",
    device: Device = "cpu",
    block_size: Annotated[
        int, typer.Option(help="Tokens in a KV block.", rich_help_panel=ENGINE_PANEL)
    ] = EngineConfig().block_size,
    share: Annotated[
        list[float] | None,
        typer.Option(help="Share of shared tokens computed anew; repeatable [dim](default: 0.05 to 0.5)[/]."),
    ] = None,
    max_kl: Annotated[float, typer.Option(help="Mean divergence of what comes next, nats.")] = _LIMITS.mean_kl,
    min_top1: Annotated[float, typer.Option(help="Tokens whose likeliest successor is the same.")] = _LIMITS.top1,
    min_needle: Annotated[
        float, typer.Option(help="Facts found, of those that are found without reuse.")
    ] = _LIMITS.needle,
    groups: Annotated[int, typer.Option(help="Rounds to measure on, of 4 to 6 agents [dim](0: 12)[/].")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of the texts.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="3 rounds: to try, not to rely on.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure on text what reuse of shared segments does to MODEL's answers; certify the ways that keep the limits.

    The certificate lies beside the converted models. `kvarn serve` reads it: reuse is "auto" unless you say otherwise.
    """
    from kvarn.serving.quality.certify import GROUPS, SHARES, certify, engine_config

    count = groups or (_QUICK if quick else GROUPS)
    config = engine_config(model, precision, kv_dtype, device, block_size)
    with progress_bar() as progress:
        task = progress.add_task("measuring rounds", total=count)
        certificate = certify(
            config, shares=share or SHARES, limits=Limits(max_kl, min_top1, min_needle), groups=count, seed=seed,
            on_group=lambda: progress.advance(task),
        )  # fmt: skip
    path = write(certificate)
    if as_json:
        typer.echo(json.dumps({"certificate": str(path), **msgspec.to_builtins(certificate)}))
        return
    _print(certificate)
    Console().print(f"Wrote {path}", highlight=False, soft_wrap=True)


def _print(certificate: Certificate) -> None:
    identity, limits = certificate.identity, certificate.limits
    title = f"{identity.model}, {identity.precision}, {identity.kv_dtype} cache: {certificate.floor.tokens} tokens"
    table = Table("mode", title=title, title_justify="left")
    for name in ("anew", "mean KL", "P95 KL", "same top-1", "perplexity", "facts", ""):
        table.add_column(name, justify="right")
    for each in certificate.measured:
        verdict = "[green]allowed[/]" if each in certificate.allowed else ""
        table.add_row(each.mode, *_cells(each.quality), verdict or ("" if limits.keeps(each.quality) else "[red]no[/]"))
    table.add_row("[dim]nothing reused[/]", *_cells(certificate.floor), "")
    table.add_row("[dim]limits[/]", "", f"{limits.mean_kl:g}", "", f"{limits.top1:.1%}", "", f"{limits.needle:.0%}", "")
    console = Console()
    console.print(table)
    console.print(_verdict(certificate.allowed), highlight=False)


def _cells(quality: Quality) -> list[str]:
    needle = "" if quality.needle is None else f"{quality.needle:.0%} of {quality.questions}"
    return [
        f"{quality.refreshed:.0%}", f"{quality.mean_kl:.3f}", f"{quality.p95_kl:.3f}", f"{quality.top1:.1%}",
        f"x {quality.perplexity_ratio:.3f}", needle,
    ]  # fmt: skip


def _verdict(allowed: list[Measured]) -> str:
    if not allowed:
        return "Nothing keeps the limits: this model is served exactly, with equal prefixes reused."
    first = allowed[0]
    what = f"share {first.share:g}" if first.mode != "lego" else f"{first.lego_blocks} block of each segment anew"
    return f"Served with reuse {first.mode}, {what}; certified in all: {', '.join(each.mode for each in allowed)}."
