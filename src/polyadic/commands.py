"""The commands of ``polyadic``: their arguments and what they print."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from polyadic.verify import Check, Problem, Result, conv_problem, linear_problem
from polyadic.verify import verify as run_verify

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


@app.command()
def verify(
    in_features: Annotated[
        int | None, typer.Option("--in", help="Features or channels in.", metavar="M")
    ] = None,
    out_features: Annotated[
        int | None, typer.Option("--out", help="Features or channels out.", metavar="N")
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(help="Check a convolution with this kernel, as in 3x3.", metavar="HxW"),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Image of the convolution, 32x32.", metavar="HxW")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Components R, 100.")] = None,
    order: Annotated[
        int | None, typer.Option(help="Modes on each side, 3 (linear) or 2 (conv).")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows, 32 (linear) or 1 (conv).")] = None,
    dtype: Annotated[str, typer.Option(help="float64, float32 or bfloat16.")] = "float64",
    seed: Annotated[int, typer.Option(help="Of the random numbers.", min=0)] = 0,
    weights: Annotated[bool, typer.Option("--weights", help="Weigh the components.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Check the layers against dense autograd.

    The factorized forward and every gradient are compared with those of the dense weight in
    float64, as the reference, the explicit forward and backward pair, and autograd give them.

    Without --in, --out and --kernel the two checks of the notebooks are run: a linear layer
    256 to 128 and a 3x3 convolution of 16 to 32 channels. Exits with 1 when anything differs.
    """
    shared = {"rank": rank, "order": order, "batch": batch, "seed": seed, "weights": weights}
    settings = {name: value for name, value in shared.items() if value is not None}
    try:
        problems = _problems(
            in_features, out_features, kernel, size, {**settings, "dtype": _dtype(dtype)}
        )
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error

    results = [run_verify(problem) for problem in problems]
    ok = all(result.ok for result in results)
    if as_json:
        print(json.dumps({"ok": ok, "results": [result.to_dict() for result in results]}, indent=2))
    else:
        console = Console()
        for result in results:
            _print_result(console, result)
    raise typer.Exit(0 if ok else 1)


@app.command()
def plan(
    in_features: Annotated[int, typer.Option("--in", help="Features or channels in.", metavar="M")],
    out_features: Annotated[
        int, typer.Option("--out", help="Features or channels out.", metavar="N")
    ],
    rank: Annotated[
        str, typer.Option(help="R, a fraction of the dense parameters, or break-even.")
    ],
    batch: Annotated[int, typer.Option(help="Rows, or images of a convolution.", min=1)] = 32,
    order: Annotated[
        int | None, typer.Option(help="Modes on each side, 3 (linear) or 2 (conv).")
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="Plan a convolution with this kernel.", metavar="HxW")
    ] = None,
    size: Annotated[str, typer.Option(help="Image of the convolution.", metavar="HxW")] = "32x32",
    stride: Annotated[int, typer.Option(help="Of the convolution.", min=1)] = 1,
    padding: Annotated[str, typer.Option(help="Zeros on each side, same or valid.")] = "0",
    dtype: Annotated[str, typer.Option(help="Of the layer.")] = "float32",
    memory: Annotated[str, typer.Option(help="fast, balanced or least.")] = "balanced",
    inference: Annotated[bool, typer.Option("--inference", help="Forward alone.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads to plan for.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine first (seconds).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show how a layer will be computed: steps, costs, dense beside it, what was rejected."""
    from polyadic import explain
    from polyadic.calibrate import calibrate as measure
    from polyadic.nn import CPConv2d, CPLinear

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        wanted = _dtype(dtype)
        if isinstance(wanted, str):
            raise ValueError(f"--dtype must be a torch dtype such as float32, got {wanted!r}")
        if calibrate:
            measure(dtype=wanted)
        shared: dict[str, Any] = {
            "rank": _rank(rank), "memory": memory, "device": "meta", "dtype": wanted,
        }  # fmt: skip
        if kernel is None:
            linear = CPLinear(in_features, out_features, order=order or 3, **shared)
            found = explain(linear, batch=batch, training=not inference, device="cpu")
        else:
            pad = int(padding) if padding.isdecimal() else padding
            conv = CPConv2d(
                in_features, out_features, _two_sizes("--kernel", kernel), stride, pad,
                order=order or 2, **shared,
            )  # fmt: skip
            image = _two_sizes("--size", size)
            found = explain(conv, batch=batch, size=image, training=not inference, device="cpu")
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)


@app.command()
def bench(
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

    try:
        if report:
            for written in write_report(out, docs, docs.parent / "README.md"):
                print(written)
            return
        wanted = _dtype(dtype)
        if isinstance(wanted, str):
            raise ValueError(f"--dtype must be a torch dtype such as float32, got {wanted!r}")
        options = Options(
            quick=quick, only=only, device=device, dtype=wanted, compiled=compiled,
            threads=tuple(_counts(threads)), modes=tuple(mode.split(",")),  # type: ignore[arg-type]
        )  # fmt: skip
        # Refreshed between cells only: a thread that draws would disturb the timings.
        with Progress(console=Console(stderr=True), auto_refresh=False) as bar:
            task = bar.add_task("measuring the machine", total=None)

            def tell(done: int, total: int, name: str) -> None:
                bar.update(task, completed=done, total=total, description=name, refresh=True)

            path = run_bench(options, out, tell)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    show(Run.load(path), Console())
    print(f"records: {path}")


def _counts(text: str) -> list[int]:
    """Thread counts separated by commas."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise ValueError(f"--threads must be counts separated by commas, as in 1,2, got {text!r}")
    return [int(part) for part in text.split(",")]


def _rank(text: str) -> int | float | str:
    """An int, a float or the word, as the layers take it."""
    if text.isdecimal():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def _problems(
    in_features: int | None,
    out_features: int | None,
    kernel: str | None,
    size: str | None,
    settings: dict[str, Any],
) -> list[Problem]:
    """Draw the checks that the arguments ask for."""
    if (in_features is None) != (out_features is None):
        raise ValueError("--in and --out go together, got one of them; give both")
    linear, conv = dict(settings), dict(settings)
    if in_features is not None:
        linear.update(in_features=in_features, out_features=out_features)
        conv.update(in_channels=in_features, out_channels=out_features)
    if kernel is not None:
        conv["kernel_size"] = _two_sizes("--kernel", kernel)
    if size is not None:
        conv["size"] = _two_sizes("--size", size)

    if kernel is not None:
        return [conv_problem(**conv)]
    if in_features is None:
        return [linear_problem(**linear), conv_problem(**conv)]
    if size is not None:
        raise ValueError("--size is the image of a convolution; give its --kernel too, as in 3x3")
    return [linear_problem(**linear)]


def _two_sizes(option: str, text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{option} must be height x width, as in 3x3, got {text!r}")
    return int(parts[0]), int(parts[1])


def _dtype(name: str) -> torch.dtype | str:
    """Find torch's dtype; where it has none the name itself is returned, to be refused."""
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else name


def _print_result(console: Console, result: Result) -> None:
    """Print a table with a row for each quantity and a column for each implementation."""
    implementations = list(dict.fromkeys(check.implementation for check in result.checks))
    rows: dict[str, dict[str, Check]] = {}
    for check in result.checks:
        rows.setdefault(check.quantity, {})[check.implementation] = check

    console.print(f"[bold]{_title(result)}[/]", soft_wrap=True)
    lower = any(check.torch_error is not None for check in result.checks)
    table = Table()
    table.add_column("relative error of", no_wrap=True)
    for heading in [*implementations, *(["torch"] if lower else []), "allowed"]:
        table.add_column(heading, justify="right")
    for quantity, checks in rows.items():
        cells = [_cell(checks.get(implementation)) for implementation in implementations]
        first = next(iter(checks.values()))
        own = [] if first.torch_error is None else [f"{first.torch_error:.1e}"]
        table.add_row(quantity, *cells, *own, f"{first.tolerance:.1e}")
    console.print(table)

    ratio = result.dense_parameters / result.parameters
    console.print(
        f"parameters: {result.parameters} in CP format, {result.dense_parameters} dense "
        f"({ratio:.2f} times as many)"
    )
    wrong = sum(not check.ok for check in result.checks)
    verdict = f"[bold red]{wrong} differ" if wrong else "[green]all agree"
    console.print(f"{len(result.checks)} quantities compared with dense autograd: {verdict}[/]\n")


def _cell(check: Check | None) -> str:
    if check is None:
        return "[dim]-[/]"
    return f"[green]{check.error:.1e}[/]" if check.ok else f"[bold red]{check.error:.1e} differs[/]"


def _title(result: Result) -> str:
    groups = " ".join("x".join(map(str, group)) for group in result.tensorized_shape)
    weights = ", weights" if result.weights else ""
    return (
        f"{result.layer} {groups}, rank {result.rank}{weights}, input "
        f"{'x'.join(map(str, result.input_shape))}, {result.dtype}, seed {result.seed}"
    )
