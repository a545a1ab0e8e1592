"""``polyadic plan``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from polyadic_cli.app import app
from polyadic_cli.parse import dtype_named, refuse_given, two_sizes


@app.command(short_help="Show how a layer will be computed, dense beside it.")
def plan(
    context: typer.Context,
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
    import torch

    from polyadic.measure.calibration import calibrate as measure
    from polyadic.nn import CPConv2d, CPLinear
    from polyadic.planner.explanation import explain

    try:
        if threads is not None:
            torch.set_num_threads(threads)
        wanted = dtype_named(dtype)
        if isinstance(wanted, str):
            raise ValueError(f"--dtype must be a torch dtype such as float32, got {wanted!r}")
        if calibrate:
            measure(dtype=wanted)
        shared: dict[str, Any] = {
            "rank": _rank(rank),
            "memory": memory,
            "device": "meta",
            "dtype": wanted,
        }
        if order is not None:
            shared["order"] = order
        if kernel is None:
            of_conv = ("size", "stride", "padding")
            refuse_given(context, of_conv, "is of a convolution, whose --kernel is missing")
            linear = CPLinear(in_features, out_features, **shared)
            found = explain(linear, batch=batch, training=not inference, device="cpu")
        else:
            pad = int(padding) if padding.isdecimal() else padding
            window = two_sizes("--kernel", kernel)
            conv = CPConv2d(in_features, out_features, window, stride, pad, **shared)
            image = two_sizes("--size", size)
            found = explain(conv, batch=batch, size=image, training=not inference, device="cpu")
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    print(json.dumps(found.to_dict(), indent=2) if as_json else found)


def _rank(text: str) -> int | float | str:
    """An int, a float or the word, as the layers take it."""
    if text.isdecimal():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text
