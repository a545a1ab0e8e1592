"""The figures of the study, drawn from its records."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks import pages
from benchmarks.records import Record

# Okabe and Ito's colours, told apart by colour-blind readers too.
STYLES = {
    "svd": ("#E69F00", "s"),
    "svd-data": ("#D55E00", "D"),
    "tltorch": ("#999999", "^"),
    "cp": ("#56B4E9", "o"),
    "cp-data": ("#0072B2", "o"),
    "compress": ("#000000", "*"),
}


def save_figures(
    encoder: Sequence[Record], classifiers: Sequence[Record], folder: Path
) -> list[Path]:
    """Draw both experiments as PNG files; the same records give the same bytes."""
    drawings = {"encoder": partial(_encoder, encoder), "digits": partial(_digits, classifiers)}
    return pages.save_figures(
        {f"compression-{name}": draw for name, draw in drawings.items()}, folder
    )


def _encoder(records: Sequence[Record]) -> Any:
    """Agreement over the ratio: dashed as converted, solid after recovery."""
    figure = pages.figure(9.6, 3.6)
    axes = figure.subplots(1, 3)
    titles = {
        "cosine": "cosine with the original's embedding",
        "overlap": "share of ten nearest neighbours kept",
        "spearman": "rank correlation of similarities",
    }
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for method in dict.fromkeys(record["method"] for record in records):
            rows = sorted(
                (r for r in records if r["method"] == method), key=lambda r: float(r["ratio"])
            )
            ratios = [r["dense_parameters"] / r["parameters"] for r in rows]
            colour, marker = STYLES[method]
            shared = {"color": colour, "marker": marker, "markersize": 5}
            ax.plot(
                ratios, [r["before"][key] for r in rows], "--", alpha=0.5, linewidth=1, **shared
            )
            ax.plot(
                ratios,
                [r["after"][key] for r in rows],
                linewidth=1.5,
                label=rows[0]["label"],
                **shared,
            )
        ax.set(xscale="log", xlabel="times fewer numbers stored", title=title, ylim=(None, 1.02))
        ax.title.set_fontsize(9)
        ticks = sorted({float(r["ratio"]) for r in records})
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.minorticks_off()
        ax.grid(color="#e4e4e4", linewidth=0.6)
    for style, when in (("--", "as converted"), ("-", "recovered")):
        axes[0].plot([], [], style, color="#555555", linewidth=1.2, label=when)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=3, loc="outside lower center")
    return figure


def _digits(records: Sequence[Record]) -> Any:
    """Mean accuracy of every way with its spread over seeds, the dense model's as a line."""
    families = list(dict.fromkeys(record["family"] for record in records))
    figure = pages.figure(9.6, 4.2)
    axes = figure.subplots(1, len(families), squeeze=False)[0]
    points = (
        ("accuracy_converted", "as converted", "#CC79A7", "x"),
        ("accuracy_one_epoch", "after one epoch", "#56B4E9", "^"),
        ("accuracy", "at the end", "#0072B2", "o"),
    )
    for ax, family in zip(axes, families, strict=True):
        rows = [r for r in records if r["family"] == family]
        ways = [way for way in dict.fromkeys(r["way"] for r in rows) if way != "dense"]
        dense = fmean(100 * r["accuracy"] for r in rows if r["way"] == "dense")
        ax.axvline(dense, color="#000000", linewidth=1, label="dense")
        ax.axvspan(dense - 0.5, dense, color="#000000", alpha=0.08, linewidth=0)
        for height, way in enumerate(ways):
            members = [r for r in rows if r["way"] == way]
            for key, label, colour, marker in points:
                values = [100 * r[key] for r in members if key in r]
                if values:
                    spread = stdev(values) if len(values) > 1 else 0.0
                    ax.errorbar(
                        fmean(values),
                        height,
                        xerr=spread,
                        color=colour,
                        marker=marker,
                        markersize=5,
                        linewidth=1,
                        label=label if way == ways[-1] else None,
                    )
        names = [next(f"{w.split()[0]}: {r['label']}" for r in rows if r["way"] == w) for w in ways]
        ax.set_yticks(range(len(ways)), names if ax is axes[0] else [""] * len(ways))
        ax.invert_yaxis()
        ax.set(title=family, xlabel="test accuracy, %, and its deviation over seeds")
        ax.grid(color="#e4e4e4", linewidth=0.6, axis="x")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=4, loc="outside lower center")
    return figure
