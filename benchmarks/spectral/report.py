"""Write the tables of ``docs/neuralop.md`` from the newest records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import between, markdown_rows, three_digits
from benchmarks.records import read

# Columns of the table of layers, by contestant.
COLUMNS = {
    "dense": "dense",
    "tucker": "Tucker",
    "cp factorized": "CP factorized",
    "cp reconstructed": "CP reconstructed",
    "cp accelerated": "accelerated",
    "cp accelerated with transforms": "accelerated, transforms",
    "CPSpectralConv": "ours, a layer of its own",
}
THEIRS = "cp factorized"
OURS = ("cp accelerated", "cp accelerated with transforms", "CPSpectralConv")


def newest(folder: Path, start: str) -> list[Any]:
    """Read the newest records whose file's name has such a start.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(folder.glob(f"{start}-*.jsonl"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no {start}-*.jsonl; run the benchmark first")
    return read(found[-1])


def cells(records: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """Measurements of layers by cell and contestant."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["kind"] == "layer":
            found.setdefault(record["cell"], {})[record["contestant"]] = record
    return found


def best_forced(cell: dict[str, Any]) -> float:
    """The quickest of the plans that were forced, and of the one chosen."""
    ours = [r["q1"] for name, r in cell.items() if name.startswith("forced: ")]
    return min([*ours, cell["CPSpectralConv"]["q1"]])


def tables(found: dict[str, dict[str, Any]]) -> str:
    """The tables of times, of memory and of the goals."""
    head = ["layer", *COLUMNS.values()]
    times, kept = [head], [head]
    names = [COLUMNS[name] for name in OURS]
    goals = [["layer", *names, "over the best plan", "kept"]]
    for name, cell in found.items():
        times.append([name, *[three_digits(1e3 * cell[c]["q1"]) for c in COLUMNS]])
        kept.append([name, *[three_digits(cell[c]["kept_bytes"] / 2**20) for c in COLUMNS]])
        theirs, last = cell[THEIRS], cell["CPSpectralConv"]
        goals.append([
            name,
            *[f"{theirs['q1'] / cell[c]['q1']:.2f}" for c in OURS],
            f"{last['q1'] / best_forced(cell):.2f}",
            f"{last['kept_bytes'] / theirs['kept_bytes']:.2f}",
        ])  # fmt: skip
    align = "l" + "r" * len(COLUMNS)
    return "\n\n".join([
        "Milliseconds of a step, forward and backward:",
        markdown_rows(times, align),
        "MiB kept for the backward, parameters left out (x counts where it is kept):",
        markdown_rows(kept, align),
        "How many times as fast as neuraloperator's CP layer; the layer's time over that of the "
        "best plan that can be forced on it; and the part of neuraloperator's bytes it keeps:",
        markdown_rows(goals, "lrrrrr"),
    ])  # fmt: skip


def solves(records: Sequence[Any]) -> str:
    """The table of the solve."""
    by_model: dict[str, list[Any]] = {}
    for record in records:
        if record["kind"] == "solve":
            by_model.setdefault(record["model"], []).append(record)
    rows = [["weights", "numbers in them", "seeds", "error, mean", "best", "worst", "ms a step"]]
    for name, each in by_model.items():
        errors = [r["error"] for r in each]
        rows.append([
            name,
            f"{each[0]['parameters']:,}",
            str(len(each)),
            f"{100 * statistics.mean(errors):.2f} %",
            f"{100 * min(errors):.2f} %",
            f"{100 * max(errors):.2f} %",
            three_digits(1e3 * min(r["seconds"] for r in each)),
        ])  # fmt: skip
    return markdown_rows(rows, "lrrrrrr")


def told(environment: dict[str, Any]) -> str:
    """Where and when records were made."""
    return (
        f"Measured on {environment['date'][:10]}: {environment['cpu']}, one thread, torch "
        f"{environment['torch']}, commit {environment['commit']}."
    )


def write(folder: Path, page: Path) -> None:
    """Write the tables between the markers of the page."""
    burgers = newest(folder, "burgers")
    text = page.read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = {}
    where = []
    for path in sorted(folder.glob("spectral-*.jsonl")):
        records = read(path)
        later = cells(records)
        # A cell that was measured again takes the place of the older one.
        found |= later
        where.append(f"{', '.join(later)}: {told(records[0])}")
    content = "\n\n".join([*where, tables(found)])
    text = between(text, "spectral layers", content)
    sizes = burgers[0]["sizes"]
    intro = (
        f"{told(burgers[0])} {sizes['steps']} steps of Adam on batches of {sizes['batch']}, "
        f"{sizes['trained_on']} initial values of {sizes['positions']} positions to train on and "
        f"{sizes['tested_on']} to test on."
    )
    text = between(text, "spectral solve", f"{intro}\n\n{solves(burgers)}")
    page.write_text(text, encoding="utf-8")
