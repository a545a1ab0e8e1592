"""The command ``polyadic`` itself, to which the others are added."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"polyadic {importlib.metadata.version('polyadic')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def polyadic(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print and exit."),
    ] = False,
) -> None:
    """CP-factorized layers for PyTorch."""
    if context.invoked_subcommand is None:
        print(context.get_help())
