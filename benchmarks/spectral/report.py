"""Write the tables of ``docs/neuralop.md`` from the newest records."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import between, markdown_rows, three_digits
from benchmarks.records import read
from polyadic.durable.files import write_text

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
# A whole model has no rebuilt weights and no layer of our own among its contestants.
OF_MODELS = ("dense", "tucker", THEIRS, *OURS[:2])


def newest(folder: Path, start: str) -> list[Any]:
    """Read the newest records whose file's name has such a start.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(folder.glob(f"{start}-*.jsonl"))
    if not found:
        raise FileNotFoundError(f"{folder} holds no {start}-*.jsonl; run the benchmark first")
    return read(found[-1])


def cells(records: Sequence[Any], kind: str = "layer", threads: int = 1) -> dict[str, Any]:
    """Measurements of layers, or of models, with so many threads by cell and contestant."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        # Records that name no threads are of one.
        if record["kind"] == kind and record.get("threads", 1) == threads:
            found.setdefault(record["cell"], {})[record["contestant"]] = record
    return found


def best_forced(cell: dict[str, Any]) -> float:
    """The quickest of the plans that were forced, and of the one chosen."""
    ours = [r["q1"] for name, r in cell.items() if name.startswith("forced: ")]
    return min([*ours, cell["CPSpectralConv"]["q1"]])


def columns(found: dict[str, Any], names: Sequence[str], field: str, unit: float) -> str:
    """A table of one field: a row for each cell and a column for each contestant."""
    rows = [["", *[COLUMNS[name] for name in names]]]
    for name, cell in found.items():
        rows.append([name, *[three_digits(cell[c][field] / unit) for c in names]])
    return markdown_rows(rows, "l" + "r" * len(names))


def tables(found: dict[str, Any]) -> str:
    """The tables of layers: times, memory and the goals."""
    goals = [["", *[COLUMNS[name] for name in OURS], "over the best plan", "kept, accelerated"]]
    for name, cell in found.items():
        theirs = cell[THEIRS]
        goals.append(
            [
                name,
                *[f"{theirs['q1'] / cell[c]['q1']:.2f}" for c in OURS],
                f"{cell['CPSpectralConv']['q1'] / best_forced(cell):.2f}",
                f"{cell[OURS[0]]['kept_bytes'] / theirs['kept_bytes']:.2f}",
            ]
        )
    names = list(COLUMNS)
    return "\n\n".join(
        [
            "Milliseconds of a step, forward and backward:",
            columns(found, names, "q1", 1e-3),
            "MiB kept for the backward, parameters left out (x counts where it is kept):",
            columns(found, names, "kept_bytes", 2**20),
            "Most MiB that a step adds to what is there:",
            columns(found, names, "peak_bytes", 2**20),
            "How many times as fast as neuraloperator's CP layer; the time of our layer over that "
            "of the best plan that can be forced on it; and the part of the bytes kept by "
            "neuraloperator that the accelerated layer keeps:",
            markdown_rows(goals, "lrrrrr"),
        ]
    )


def tables_of_models(found: dict[str, Any]) -> str:
    """The tables of whole models: times and memory."""
    return "\n\n".join(
        [
            "Whole models of four blocks, milliseconds of a step; the Tucker model is "
            "neuraloperator's TFNO as it comes:",
            columns(found, OF_MODELS, "q1", 1e-3),
            "MiB that they keep for the backward:",
            columns(found, OF_MODELS, "kept_bytes", 2**20),
            "Most MiB that a step adds:",
            columns(found, OF_MODELS, "peak_bytes", 2**20),
        ]
    )


def solves(records: Sequence[Any]) -> str:
    """The table of the solve."""
    by_model: dict[str, list[Any]] = {}
    for record in records:
        if record["kind"] == "solve":
            by_model.setdefault(record["model"], []).append(record)
    rows = [["weights", "numbers in them", "seeds", "error, mean", "best", "worst", "ms a step"]]
    for name, each in by_model.items():
        errors = [r["error"] for r in each]
        rows.append(
            [
                name,
                f"{each[0]['parameters']:,}",
                str(len(each)),
                f"{100 * statistics.mean(errors):.2f} %",
                f"{100 * min(errors):.2f} %",
                f"{100 * max(errors):.2f} %",
                three_digits(1e3 * min(r["seconds"] for r in each)),
            ]
        )
    return markdown_rows(rows, "lrrrrrr")


def told(environment: dict[str, Any]) -> str:
    """Where and when records were made."""
    return (
        f"Measured on {environment['date'][:10]}: {environment['cpu']}, torch "
        f"{environment['torch']}, commit {environment['commit']}."
    )


def write(folder: Path, page: Path) -> None:
    """Write the tables between the markers of the page."""
    burgers = newest(folder, "burgers")
    text = page.read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = {}
    models: dict[str, dict[str, Any]] = {}
    twice: dict[str, dict[str, Any]] = {}
    where: dict[str, str] = {}
    for path in sorted(folder.glob("spectral-*.jsonl")):
        records = read(path)
        later, whole = cells(records), cells(records, "model")
        # A cell that was measured again takes the place of the older one.
        found |= later
        models |= whole
        twice |= cells(records, threads=2)
        where |= dict.fromkeys([*later, *whole], told(records[0]))
    by_source: dict[str, list[str]] = {}
    for name, source in where.items():
        by_source.setdefault(source, []).append(name)
    content = [f"{', '.join(names)}: {source}" for source, names in by_source.items()]
    content += ["With one thread:", tables(found)]
    if twice:
        content += [
            "Milliseconds with two threads, by the wall clock:",
            columns(twice, list(COLUMNS), "q1", 1e-3),
        ]
    if models:
        content.append(tables_of_models(models))
    text = between(text, "spectral layers", "\n\n".join(content))
    sizes = burgers[0]["sizes"]
    intro = (
        f"{told(burgers[0])} {sizes['steps']} steps of Adam on batches of {sizes['batch']}, "
        f"{sizes['trained_on']} initial values of {sizes['positions']} positions to train on and "
        f"{sizes['tested_on']} to test on."
    )
    text = between(text, "spectral solve", f"{intro}\n\n{solves(burgers)}")
    write_text(page, text)
