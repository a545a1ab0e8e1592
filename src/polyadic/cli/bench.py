"""``polyadic bench``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from polyadic.cli.app import app
from polyadic.cli.parse import dtype_named, refuse_given

_OF_A_RUN = ("quick", "only", "device", "threads", "dtype", "mode", "compiled")


@app.command()
def bench(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Nine cells, about a minute.")] = False,
    only: Annotated[
        str | None, typer.Option(help="Cells by name, or by a part of it.", metavar="PATTERN")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[str, typer.Option(help="Thread counts, as in 1,2.")] = "1",
    dtype: Annotated[str, typer.Option(help="Of all tensors.")] = "float32",
    mode: Annotated[str, typer.Option(help="forward, training or both.")] = "forward,training",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also under torch.compile; far longer.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("polyadic-bench"),
    report: Annotated[
        bool, typer.Option("--report", help="Measure nothing: renew docs from --out's records.")
    ] = False,
    docs: Annotated[Path, typer.Option(help="Folder that --report writes to.")] = Path("docs"),
) -> None:
    """Time our layers against dense, other libraries and every plan; check all gradients first."""
    from polyadic.bench import Options, run_bench
    from polyadic.bench.records import Run
    from polyadic.bench.report import write_report
    from polyadic.bench.show import show

    if report:
        refuse_given(context, _OF_A_RUN, "is of a run, and --report measures nothing")
    else:
        refuse_given(context, ("docs",), "is where --report writes to, which is not asked for")
    try:
        if report:
            for written in write_report(out, docs, docs.parent / "README.md"):
                print(written)
            return
        wanted = dtype_named(dtype)
        if isinstance(wanted, str):
            raise ValueError(f"--dtype must be a torch dtype such as float32, got {wanted!r}")
        options = Options(
            quick=quick, only=only, device=device, dtype=wanted, compiled=compiled,
            threads=tuple(_counts(threads)),
            modes=tuple(map(str.strip, mode.split(","))),  # type: ignore[arg-type]
        )  # fmt: skip
        # Refreshed between cells only: a thread that draws would disturb the timings.
        with Progress(console=Console(stderr=True), auto_refresh=False) as bar:
            task = bar.add_task("measuring the machine", total=None)

            def tell(done: int, total: int, name: str) -> None:
                bar.update(task, completed=done, total=total, description=name, refresh=True)

            path = run_bench(options, out, tell)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    except ImportError as error:
        print(f"polyadic: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    show(Run.load(path), Console())
    print(f"records: {path}")


def _counts(text: str) -> list[int]:
    """Thread counts separated by commas."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"--threads must be counts separated by commas, as in 1,2, got {text!r}")
    return [int(part) for part in text.split(",")]
