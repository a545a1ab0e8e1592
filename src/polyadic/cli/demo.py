"""``polyadic demo``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from polyadic.cli.app import app


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report and the plots.")] = Path(
        "polyadic-demo"
    ),
    seed: Annotated[int, typer.Option(help="Same seed, same result.", min=0)] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of each model.")] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default torch's own choice.")
    ] = None,
) -> None:
    """Train CP and dense networks on real digits."""
    from polyadic.demo import run_demo

    try:
        run_demo(out=out, seed=seed, quick=quick, threads=threads)
    except OSError as error:
        raise typer.BadParameter(str(error)) from error
    except ImportError as error:
        if error.name is not None:
            raise
        # raised on purpose by the demo: it names the packages that the extra would bring
        print(f"polyadic: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
