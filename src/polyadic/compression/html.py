"""The report of a compression as one self-contained HTML page, and the look of its plots."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#1f2430"
GRID = "#d9dde3"
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#6b7280",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
_CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #f3f4f6; color: #1f2430;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 84rem; margin: 0 auto; padding: 2.5rem 1.2rem 4rem; background: #fff; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-bottom: .3rem;
  border-bottom: 1px solid #d9dde3; }
p, ul { margin: .6rem 0; max-width: 50rem; }
li { margin: .35rem 0; }
.lead { color: #4b5563; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .75rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .25rem; text-align: right; white-space: nowrap; vertical-align: top; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; }
td:first-child, td:last-child { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
td:nth-child(5) { white-space: normal; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
thead tr:last-child th { border-bottom: 2px solid #1f2430; }
tbody td { border-bottom: 1px solid #e5e7eb; }
figure { margin: 1.2rem 0 1.6rem; }
figure img { width: 100%; max-width: 62rem; height: auto; display: block; }
figcaption { color: #4b5563; font-size: .92rem; max-width: 50rem; margin-top: .5rem; }
@media (max-width: 40rem) { main { padding: 1.2rem; } }
@media print { body, main { background: #fff; } main { max-width: none; padding: 0; } }
"""


def document(title: str, body: str) -> str:
    """Make a page that refers to nothing outside itself.

    Args:
        title: the title of the page, as plain text.
        body: the body, as HTML.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def figure(alt: str, png: bytes, caption: str) -> str:
    """Make a picture that stands in the page itself.

    Args:
        alt: what the picture shows, as plain text.
        png: the bytes of a PNG file.
        caption: the caption, as plain text.
    """
    source = b64encode(png).decode("ascii")
    return (
        f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{source}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


@contextmanager
def style() -> Iterator[None]:
    """Use this style inside the block, and restore the user's after it."""
    from matplotlib import rc_context

    with rc_context(rc=_STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Make a figure of ``width`` by ``height`` inches with its own Agg canvas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.09, h_pad=0.09)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """Render a figure as the bytes of a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()
