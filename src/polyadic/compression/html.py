"""A page of HTML that refers to nothing outside itself, light or dark, with figures in SVG.

Lines and letters of the figures have the colour of the page's text, so that they show on both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What stands in for the colour of the page's text until a figure is in the page.
TEXT = "#010203"
_FIGURES: Any = {
    "font.size": 10, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "grid.color": "#8080804d", "legend.frameon": False,
    "svg.fonttype": "none", "font.family": "sans-serif", "text.color": TEXT,
    "axes.labelcolor": TEXT, "axes.edgecolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
}  # fmt: skip
_CSS = """:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --quiet: #57606a;
  --line: #d0d7de; --verdict: #e8f3ee; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --text: #e6e9ec; --quiet: #9aa4ae;
  --line: #363c43; --verdict: #17312a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif;
  background: var(--page); color: var(--text); }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; } h2 { margin-top: 2.5rem; }
.verdict { background: var(--verdict); padding: .8rem 1rem; border-radius: .5rem; }
.wide { overflow-x: auto; }
.panels { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; }
td { white-space: nowrap; } th { vertical-align: bottom; }
td { border-bottom: 1px solid var(--line); } td:first-child, th:first-child { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; text-align: left; }
figure { margin: 1rem 0; } svg { width: 100%; height: auto; } figcaption { color: var(--quiet); }
@media (max-width: 30rem) { table { font-size: .85rem; } th, td { padding: .3rem .25rem; } }
"""


def document(title: str, body: str, style: str = "") -> str:
    """Make a page.

    Args:
        title: the title of the page, as plain text.
        body: the body, as HTML.
        style: CSS of this page alone, after that of all pages.
    """
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_CSS}{style}</style></head><body>
{body}
</body></html>
"""


def svg(
    name: str, width: float, height: float, draw: Callable[[Figure, Any], None], what: Any
) -> str:
    """Draw something into a figure of so many inches, as SVG to stand in a page.

    Args:
        name: tells the figure's inner names from those of others on the page.
        width: inches.
        height: inches.
        draw: draws ``what`` into a figure; matplotlib's global state is left alone.
        what: handed to ``draw``.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_FIGURES, "svg.hashsalt": name}):
        figure, text = Figure((width, height), layout="constrained"), StringIO()
        draw(figure, what)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawn = text.getvalue()
    drawn = re.sub(
        r"<metadata>.*?</metadata>|<!--.*?-->", "", drawn[drawn.index("<svg") :], flags=re.DOTALL
    )
    drawn = re.sub(r' xmlns(:\w+)?="[^"]*"| id="(?!\w*[0-9a-f]{10})[^"]*"', "", drawn)
    drawn = re.sub(r"\n\s+", "\n", drawn)
    label = escape(name)
    sized = f'<svg role="img" aria-label="{label}" style="max-width: {width * 100:.0f}px"'
    return drawn.replace("xlink:href", "href").replace(TEXT, "currentColor").replace("<svg", sized)
