"""The report of a compression as a page with tables and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from polyadic.compression.html import document, figure, new_figure, png, style
from polyadic.compression.layer_report import LayerReport, modes_text
from polyadic.planner.report import count_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One colour per order, from Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = {1: "#000000", 2: "#0072b2", 3: "#e69f00"}
_OTHER = "#009e73"
# Most layers that get a panel of their own.
_PANELS = 24
_HEADINGS = (
    "layer", "kind", "weight", "decision", "modes", "rank", "parameters", "of", "FLOPs", "of",
    "predicted ms", "of", "weight error", "output error", "importance", "reason",
)  # fmt: skip


def html(title: str, lead: str, summary: Sequence[str], layers: Sequence[LayerReport]) -> str:
    """Write the page.

    Args:
        title: its title.
        lead: a sentence on what the page is about.
        summary: sums over all layers, one sentence each.
        layers: the layers in the order of the table.

    Returns:
        An HTML document.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401 - whether it is there
    except ImportError as error:
        raise ImportError(
            "the plots of the report need matplotlib: pip install 'polyadic[compress]'"
        ) from error
    sums = "".join(f"<li>{escape(line)}</li>" for line in summary)
    headings = "".join(f"<th>{escape(name)}</th>" for name in _HEADINGS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in _cells(layer)) + "</tr>"
        for layer in layers
    )
    pictures = []
    weighed = [layer for layer in layers if layer.decision != "skipped"]
    if weighed:
        pictures.append(
            figure(
                "Bars of parameters per layer",
                _parameters(weighed),
                "Parameters of the layers weighed, before and after.",
            )
        )
    drawn = [layer for layer in weighed if layer.curves]
    if drawn:
        more = (
            f" The first {_PANELS} of {len(drawn)} layers are shown."
            if len(drawn) > _PANELS
            else ""
        )
        pictures.append(
            figure(
                "Error against parameters for each layer",
                _curves(drawn[:_PANELS]),
                "Relative error, in the metric of the fit, against the fraction of the dense "
                "parameters. Lines: plain low rank, exact. Points: other orders, short fits. "
                f"Crosses: what was chosen.{more}",
            )
        )
    body = f"""<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
<ul>{sums}</ul>
<h2>Layers</h2>
<div class="scroll"><table><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table></div>
<h2>Plots</h2>
{"".join(pictures)}"""
    return document(title, body)


def _cells(layer: LayerReport) -> tuple[str, ...]:
    return (
        " = ".join(layer.names),
        layer.kind,
        "×".join(map(str, layer.weight_shape)),
        layer.decision,
        modes_text(layer.modes),
        str(layer.rank or ""),
        f"{layer.parameters:,}",
        f"{layer.dense_parameters:,}",
        _number(layer.flops),
        _number(layer.dense_flops),
        _milliseconds(layer.seconds),
        _milliseconds(layer.dense_seconds),
        _error(layer.weight_error),
        _error(layer.output_error),
        _error(layer.importance),
        layer.reason,
    )


def _number(value: int | None) -> str:
    return "" if value is None else count_text(value)


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{1e3 * value:.3g}"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _short(layer: LayerReport) -> str:
    return layer.name if len(layer.name) <= 36 else "…" + layer.name[-35:]


def _parameters(layers: Sequence[LayerReport]) -> bytes:
    """Draw bars of the parameters of each layer."""
    places = range(len(layers))
    with style():
        canvas = new_figure(9.6, 1.2 + 0.24 * len(layers))
        axes = canvas.subplots()
        axes.barh(
            places,
            [layer.dense_parameters for layer in layers],
            height=0.8,
            color="#d9dde3",
            label="dense",
        )
        axes.barh(
            places,
            [layer.parameters for layer in layers],
            height=0.5,
            color="#0072b2",
            label="after",
        )
        axes.set_yticks(places, [_short(layer) for layer in layers])
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.set_xlabel("parameters")
        axes.legend()
        return png(canvas)


def _curves(layers: Sequence[LayerReport]) -> bytes:
    """Draw the error curves of each layer in a panel."""
    columns = min(3, len(layers))
    rows = math.ceil(len(layers) / columns)
    with style():
        canvas = new_figure(3.3 * columns, 2.5 * rows)
        grid = canvas.subplots(rows, columns, squeeze=False)
        for axes, layer in zip(grid.flat, layers, strict=False):
            _curve(axes, layer)
        for axes in list(grid.flat)[len(layers) :]:
            axes.set_axis_off()
        return png(canvas)


def _curve(axes: Axes, layer: LayerReport) -> None:
    for curve in layer.curves:
        fractions = [count / layer.dense_parameters for count in curve.parameters]
        color = _COLORS.get(curve.order, _OTHER)
        label = "plain low rank" if curve.exact else f"order {curve.order}"
        axes.plot(
            fractions,
            curve.errors,
            color=color,
            lw=1.5,
            ls="-" if curve.exact else ":",
            marker="" if curve.exact else "o",
            ms=4,
            label=label,
        )
    if layer.predicted_error is not None:
        axes.plot(
            [layer.parameters / layer.dense_parameters],
            [layer.predicted_error],
            color="#d55e00",
            marker="x",
            ms=9,
            mew=2.5,
            ls="",
        )
    axes.set_xscale("log")
    axes.set_ylim(0, 1.05)
    axes.set_title(_short(layer), fontsize=8)
    axes.set_xlabel("fraction of parameters")
    axes.set_ylabel("relative error")
    axes.legend()
