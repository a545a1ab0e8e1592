"""The report of a compression as a page with tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from polyadic.compression.html import TEXT, document, svg
from polyadic.compression.layer_report import LayerReport, modes_text
from polyadic.planner.report import count_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One colour per order, from Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = {1: TEXT, 2: "#0072b2", 3: "#e69f00"}
_OTHER = "#009e73"
_DENSE, _AFTER = "#80808060", "#0072b2"
# The table has many columns; those with words may be broken, and so do long names of layers.
_STYLE = """body { max-width: 86rem; } p, ul, figcaption { max-width: 50rem; }
.layers table { font-size: .75rem; } .layers :is(th, td) { padding: .3rem .25rem; }
.layers :is(td:first-child, td:last-child) { white-space: normal; overflow-wrap: anywhere;
  min-width: 10rem; } .layers td:nth-child(5) { white-space: normal; }
.layers :is(th, td):last-child { text-align: left; } .wide > svg { min-width: 36rem; }
.panels { grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); }
@media (max-width: 60rem) { .layers td:last-child { min-width: 24rem; } }
"""
# Most layers that get a panel of their own.
_PANELS = 24
_HEADINGS = (
    "layer", "kind", "weight", "decision", "modes", "rank", "parameters", "of", "FLOPs", "of",
    "predicted ms", "of", "weight error", "output error", "importance", "reason",
)  # fmt: skip


def html(
    title: str, verdict: str, lead: str, summary: Sequence[str], layers: Sequence[LayerReport]
) -> str:
    """Write the page.

    Args:
        title: its title.
        verdict: what came of the compression.
        lead: sentences on what was done.
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
    pictures = ""
    weighed = [layer for layer in layers if layer.decision != "skipped"]
    if weighed:
        bars = svg("parameters", 9.6, 1.2 + 0.24 * len(weighed), _parameters, weighed)
        caption = "Parameters of the layers weighed, before and after."
        pictures += (
            f'<figure><div class="wide">{bars}</div><figcaption>{caption}</figcaption></figure>'
        )
    drawn = [layer for layer in weighed if layer.curves]
    if drawn:
        panels = "".join(svg(layer.name, 3.6, 2.7, _curve, layer) for layer in drawn[:_PANELS])
        caption = (
            "Relative error, in the metric of the fit, against the fraction of the dense "
            "parameters. Lines: plain low rank, exact. Points: other orders, short fits. "
            "Crosses: what was chosen."
        )
        if len(drawn) > _PANELS:
            caption += f" The first {_PANELS} of {len(drawn)} layers are shown."
        pictures += (
            f'<figure><div class="panels">{panels}</div><figcaption>{caption}</figcaption></figure>'
        )
    table = f"<table><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table>"
    body = f"""<h1>{escape(title)}</h1>
<p class="verdict">{escape(verdict)}</p>
<p>{escape(lead)}</p>
<ul>{sums}</ul>
<h2>Layers</h2>
<div class="wide layers">{table}</div>
<h2>Plots</h2>
{pictures}"""
    return document(title, body, _STYLE)


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


def _parameters(figure: Figure, layers: Sequence[LayerReport]) -> None:
    """Draw bars of the parameters of each layer."""
    axes, places = figure.subplots(), range(len(layers))
    before, after = zip(*((x.dense_parameters, x.parameters) for x in layers), strict=True)
    axes.barh(places, before, height=0.8, color=_DENSE, label="dense")
    axes.barh(places, after, height=0.5, color=_AFTER, label="after")
    axes.set_yticks(places, [_short(layer) for layer in layers])
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlabel("parameters")
    axes.legend()


def _curve(figure: Figure, layer: LayerReport) -> None:
    """Draw the error curves of a layer."""
    axes: Axes = figure.subplots()
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
