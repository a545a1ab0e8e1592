"""What generated pages have in common: markers, tables and the look of figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyadic.durable.files import replacing


def between(text: str, mark: str, content: str) -> str:
    """Replace what stands between ``<!-- mark:begin -->`` and ``<!-- mark:end -->``.

    Raises:
        ValueError: the markers are missing.
    """
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"the page must hold the markers {begin} and {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def markdown_rows(rows: Sequence[Sequence[str]], align: str) -> str:
    """A Markdown table whose first row is the head; ``align`` has l or r for each column."""
    rule = ["---:" if a == "r" else "---" for a in align]
    lines = [rows[0], rule, *rows[1:]]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def three_digits(value: float) -> str:
    """Three significant digits without an exponent, four decimals at most."""
    digits = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(digits, 0), 4)}f}"


def figure(width: float, height: float) -> Any:
    """An empty figure, in inches, that belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


# No software version or date inside, and in an SVG file no address of a vocabulary.
_NAMELESS: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": dict.fromkeys(("Creator", "Date", "Format", "Type")),
}


def save_figures(
    drawings: Mapping[str, Callable[[], Any]], folder: Path, ending: str = "png"
) -> list[Path]:
    """Draw figures and save them; the same records give the same bytes.

    Args:
        drawings: by name of the file without its ending; what makes the figure, or None where
            there is nothing to draw.
        folder: made where it is missing.
        ending: of the files, ``png`` or ``svg``. Both have a white ground, so that they can be read
            on a dark page.

    Returns:
        The files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    saved = []
    with _look():
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in drawings.items():
            drawn = draw()
            if drawn is not None:
                saved.append(folder / f"{name}.{ending}")
                with replacing(saved[-1]) as draft:
                    drawn.savefig(draft, format=ending, dpi=100, metadata=_NAMELESS[ending])
    return saved


@contextmanager
def _look() -> Iterator[None]:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError("the figures need matplotlib: pip install -e '.[benchmarks]'") from error
    look: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    # Names inside an SVG file are drawn by chance where nothing fixes them.
    look["svg.hashsalt"] = "polyadic"
    with mpl.rc_context(look):
        yield
