"""The `kvarn` command: puts the sub-commands together and turns errors into one line and exit code 2."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from kvarn import __version__
from kvarn.cli import bench, calibrate, chat, generate, model, reproduce, serve, simulate
from kvarn.errors import KvarnError
from kvarn.kernels import native
from kvarn.serving.processors import wait_gently

app = typer.Typer(
    name="kvarn",
    help="Serve language models where memory and links are the bottleneck.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("serve")(serve.serve)
app.command("chat")(chat.chat)
app.command("generate")(generate.generate)
app.command("simulate")(simulate.simulate)
app.command("calibrate")(calibrate.calibrate)
app.command("reproduce")(reproduce.reproduce)
app.add_typer(model.app, name="model")
app.add_typer(bench.app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"kvarn {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 the run failed, 2 bad input or environment, 130 interrupted."""
    wait_gently()
    try:
        _check_environment()
        app()
    except KvarnError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left; there is nobody to complain to
        sys.exit(1)


def _check_environment() -> None:
    kernels = os.environ.get("KVARN_KERNELS", "native")
    if kernels not in native.CHOICES:
        raise KvarnError(f"KVARN_KERNELS is {kernels!r}; choose one of {', '.join(native.CHOICES)}")


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


if __name__ == "__main__":
    main()
