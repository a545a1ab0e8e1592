"""``polyadic verify``, and the table it prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from polyadic_cli.app import app
from polyadic_cli.parse import dtype_named, two_sizes

if TYPE_CHECKING:
    from polyadic.testing.verification import Check, Problem, Result


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
    dtype: Annotated[
        str, typer.Option(help="float64, float32, bfloat16, complex128 or complex64.")
    ] = "float64",
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
    from polyadic.testing.verification import verify as run_verify

    shared = {"rank": rank, "order": order, "batch": batch, "seed": seed, "weights": weights}
    settings = {name: value for name, value in shared.items() if value is not None}
    try:
        problems = _problems(
            in_features, out_features, kernel, size, {**settings, "dtype": dtype_named(dtype)}
        )
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error

    results = [run_verify(problem) for problem in problems]
    ok = all(result.ok for result in results)
    if as_json:
        print(json.dumps({"ok": ok, "results": [result.to_dict() for result in results]}, indent=2))
    else:
        # A narrow or missing window must not cut numbers off.
        console = Console(width=max(Console().width, 100))
        for result in results:
            _print_result(console, result)
    raise typer.Exit(0 if ok else 1)


def _problems(
    in_features: int | None,
    out_features: int | None,
    kernel: str | None,
    size: str | None,
    settings: dict[str, Any],
) -> list[Problem]:
    """Draw the checks that the arguments ask for."""
    from polyadic.testing.verification import conv_problem, linear_problem

    if (in_features is None) != (out_features is None):
        raise ValueError("--in and --out go together, got one of them; give both")
    linear, conv = dict(settings), dict(settings)
    if in_features is not None:
        linear.update(in_features=in_features, out_features=out_features)
        conv.update(in_channels=in_features, out_channels=out_features)
    if kernel is not None:
        conv["kernel_size"] = two_sizes("--kernel", kernel)
    if size is not None:
        conv["size"] = two_sizes("--size", size)

    if kernel is not None:
        return [conv_problem(**conv)]
    if in_features is None:
        return [linear_problem(**linear), conv_problem(**conv)]
    if size is not None:
        raise ValueError("--size is the image of a convolution; give its --kernel too, as in 3x3")
    return [linear_problem(**linear)]


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

    console.print(f"plan of autograd: {result.plan}", soft_wrap=True, highlight=False)
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
