"""`kvarn calibrate`: a profile of this machine for `kvarn simulate`, from a short real run."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvarn.cli.options import AsJson, CacheDType, Model, Precision
from kvarn.cli.runs import progress_bar
from kvarn.hardware.accelerators import load_accelerator, save_accelerator
from kvarn.hardware.models import ModelShape
from kvarn.hardware.roofline import Roofline
from kvarn.serving.config import EngineConfig
from kvarn.simulation import calibration, fitting

_KV_BYTES = 256 * 2**20
_WHAT = {
    "step_seconds": ("overhead of a step", "{:.2f} ms", 1e3),
    "sequence_seconds": ("overhead of a sequence", "{:.1f} us", 1e6),
    "chunk_seconds": ("overhead of a prompt", "{:.2f} ms", 1e3),
    "weights_share": ("reading weights", "{:.1f} GB/s", 1e-9),
    "compute_share": ("multiplying", "{:.0f} GFLOP/s", 1e-9),
    "kv_share": ("reading keys and values", "{:.1f} GB/s", 1e-9),
    "attention_share": ("attention of prompts", "{:.0f} GFLOP/s", 1e-9),
}


def calibrate(
    model: Model = "smollm2",
    precision: Precision = "auto",
    kv_dtype: CacheDType = "auto",
    output: Annotated[Path, typer.Option(help="Profile to write.")] = Path("profile.toml"),
    as_json: AsJson = False,
) -> None:
    """Time steps of the engine on this machine and fit a profile to them that `kvarn simulate --hardware` reads."""
    from kvarn.models.config import read_config
    from kvarn.models.loader import free_bytes, usable_device
    from kvarn.serving.assemble import load_engine

    config = EngineConfig(
        model=model, precision=precision, kv_dtype=kv_dtype, speculation="off", share_prefixes=False,
        kv_memory_bytes=_KV_BYTES,
    )  # fmt: skip
    repeats, memory = 2, free_bytes(usable_device("cpu"))
    with progress_bar() as progress:
        task = progress.add_task("loading", total=repeats * len(calibration.PLAN))
        loaded = load_engine(config)
        progress.update(task, description="timing steps")
        samples = calibration.time_steps(loaded.engine, repeats=repeats, on_round=lambda: progress.advance(task))
    shape = ModelShape.from_config(loaded.spec.name, read_config(loaded.folder))
    title = f"this machine, {shape.name} in {loaded.spec.precision}"
    device = replace(
        load_accelerator("cpu"), name="calibrated", title=title, memory_bytes=memory, host_memory_bytes=memory
    )
    fit = fitting.fit(samples, Roofline.of(device, shape, loaded.spec.precision, kv_dtype))
    save_accelerator(
        fit.accelerator, output,
        [f"Written by kvarn calibrate: {title}, {len(samples)} steps.",
         f"Error of step times: {fit.median_error:.1%} median, {fit.p90_error:.1%} at P90.",
         *(f"{each.name}: {each.median_error:.1%} median, {each.total_error:+.1%} together." for each in fit.regimes)],
    )  # fmt: skip
    if as_json:
        errors = {"median_error": fit.median_error, "p90_error": fit.p90_error, "total_error": fit.total_error}
        regimes = [asdict(each) for each in fit.regimes]
        typer.echo(
            json.dumps(
                {"profile": str(output), "steps": len(samples), "fitted": fit.fitted, **errors, "regimes": regimes}
            )
        )
        return
    _print(fit, len(samples), output)


def _print(fit: fitting.Fit, steps: int, output: Path) -> None:
    device = fit.accelerator
    peaks = {"weights_share": device.memory_bandwidth, "kv_share": device.memory_bandwidth}
    peaks |= {"compute_share": device.flops, "attention_share": device.flops}
    table = Table("", "fitted", title=device.title, title_justify="left")
    for field, (what, form, unit) in _WHAT.items():
        value = form.format(getattr(device, field) * peaks.get(field, 1.0) * unit)
        table.add_row(what, value if field in fit.fitted else f"{value} (assumed)")
    table.add_row("error of a step", f"{fit.median_error:.1%} median, {fit.p90_error:.1%} P90")
    for each in fit.regimes:
        table.add_row(f"  {each.name}", f"{each.median_error:.1%} median, {each.total_error:+.1%} together")
    table.add_row(f"error of all {steps} steps together", f"{fit.total_error:+.1%}")
    console = Console()
    console.print(table)
    console.print(
        f"Wrote {output}; simulate it with: kvarn simulate --hardware {output}", highlight=False, soft_wrap=True
    )
