"""The demo's plots of training and cost, drawn with Agg canvases; no global backend is touched."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from examples.digits.findings import families
from examples.digits.training import ModelResult
from polyadic.compression.html import new_figure, png, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by readers with colour-blindness too; one per rank.
_LOOKS: dict[str, dict[str, Any]] = {
    "dense": {"color": "#000000", "marker": "s", "ls": "-"},
    "narrow": {"color": "#7f7f7f", "marker": "X", "ls": "--"},
}
_CP_LOOKS: dict[int | None, dict[str, Any]] = {
    4: {"color": "#e69f00", "marker": "o", "ls": "-"},
    16: {"color": "#0072b2", "marker": "^", "ls": "-"},
    64: {"color": "#009e73", "marker": "D", "ls": "-"},
}


def _look(result: ModelResult) -> dict[str, Any]:
    """Colour, marker and dash of a model, the same in every plot."""
    contestant = result.contestant
    return _CP_LOOKS[contestant.rank] if contestant.kind == "cp" else _LOOKS[contestant.kind]


def curves(results: Sequence[ModelResult]) -> bytes:
    """Draw training loss and test accuracy against epochs, mean and range over the seeds.

    Args:
        results: Models of all families.

    Returns:
        A PNG.
    """
    grouped = families(results)
    with style():
        figure = new_figure(9.6, 3.3 * len(grouped))
        axes = figure.subplots(len(grouped), 2, squeeze=False)
        for row, (family, members) in zip(axes, grouped.items(), strict=True):
            losses, accuracies = row
            for result in members:
                label, look = result.contestant.label, _look(result)
                by_epoch = zip(*(curve.loss for curve in result.curves), strict=True)
                _band(losses, [*by_epoch], look, label)
                by_epoch = zip(*(curve.accuracy for curve in result.curves), strict=True)
                _band(accuracies, [[100 * a for a in epoch] for epoch in by_epoch], look, label)
            losses.set_yscale("log")
            losses.set_title(f"{family}: training loss")
            losses.set_ylabel("cross-entropy (nats)")
            accuracies.set_title(f"{family}: test accuracy")
            accuracies.set_ylabel("test accuracy (%)")
            last = [100 * curve.accuracy[-1] for result in members for curve in result.curves]
            # where every curve ends is to be seen, where it begins need not
            accuracies.set_ylim(max(0.0, min(75.0, max(last) - 25, min(last) - 2)), 100.5)
            for axis in row:
                axis.set_xlabel("epoch")
                axis.xaxis.get_major_locator().set_params(integer=True)
                axis.grid(True)
            accuracies.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return png(figure)


def _band(
    axis: Axes, by_epoch: Sequence[Sequence[float]], look: dict[str, Any], label: str
) -> None:
    epochs = range(1, len(by_epoch) + 1)
    means = [fmean(values) for values in by_epoch]
    axis.plot(epochs, means, color=look["color"], ls=look["ls"], lw=1.8, label=label)
    if any(len(values) > 1 for values in by_epoch):
        low, high = [min(v) for v in by_epoch], [max(v) for v in by_epoch]
        axis.fill_between(epochs, low, high, color=look["color"], alpha=0.13, lw=0)


def accuracy_against_parameters(results: Sequence[ModelResult]) -> bytes:
    """Draw test accuracy against the model's parameters, one panel per family.

    Args:
        results: Models of all families.

    Returns:
        A PNG.
    """
    grouped = families(results)
    with style():
        figure = new_figure(9.6, 3.9)
        axes = figure.subplots(1, len(grouped), squeeze=False, sharey=True)[0]
        for axis, (family, members) in zip(axes, grouped.items(), strict=True):
            for result in members:
                look = _look(result)
                mean = 100 * result.accuracy
                low, high = 100 * min(result.accuracies), 100 * max(result.accuracies)
                axis.plot(
                    result.parameters,
                    mean,
                    color=look["color"],
                    marker=look["marker"],
                    ms=8,
                    ls="none",
                    label=result.contestant.label,
                )
                axis.errorbar(
                    result.parameters,
                    mean,
                    yerr=[[mean - low], [high - mean]],
                    color=look["color"],
                    ls="none",
                    capsize=4,
                )
            axis.set_xscale("log")
            axis.set_xlim(2e3, 1.5e5)
            axis.set_xticks([2e3, 5e3, 1e4, 2e4, 5e4, 1e5])
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.minorticks_off()
            axis.set_title(family)
            axis.set_xlabel("parameters of the whole model")
            axis.grid(True)
            axis.legend(
                loc="lower right", frameon=True, framealpha=1, edgecolor="white", borderaxespad=0.8
            )
        axes[0].set_ylabel("test accuracy (%)")
        return png(figure)


def costs(results: Sequence[ModelResult]) -> bytes:
    """Draw time per training step and bytes kept for backward as bars.

    Args:
        results: Models of all families.

    Returns:
        A PNG.
    """
    grouped = families(results)
    with style():
        figure = new_figure(9.6, 0.9 + 0.42 * len(results) + 0.5 * len(grouped))
        axes = figure.subplots(
            len(grouped), 2, squeeze=False, height_ratios=[len(m) for m in grouped.values()]
        )
        for row, (family, members) in zip(axes, grouped.items(), strict=True):
            colors = [_look(result)["color"] for result in members]
            labels = [result.contestant.label for result in members]
            times = [1e3 * result.time.median for result in members]
            quartiles = [
                [1e3 * (result.time.median - result.time.low) for result in members],
                [1e3 * (result.time.high - result.time.median) for result in members],
            ]
            row[0].barh(labels, times, color=colors, height=0.62)
            row[0].errorbar(
                times,
                range(len(times)),
                xerr=quartiles,
                ls="none",
                color="#b91c1c",
                capsize=2,
                lw=1,
            )
            right = [1e3 * result.time.high for result in members]
            _values(row[0], right, [f"{value:.2f}" for value in times])
            row[0].set_title(f"{family}: time per training step")
            row[0].set_xlabel("median and quartiles (ms)")
            kept = [result.kept_bytes / 1024 for result in members]
            row[1].barh(labels, kept, color=colors, height=0.62)
            _values(row[1], kept, [f"{value:,.0f}" for value in kept])
            row[1].set_title(f"{family}: kept for backward")
            row[1].set_xlabel("one batch of training (KiB)")
            row[1].set_yticklabels([])
            for axis in row:
                axis.invert_yaxis()
                axis.tick_params(axis="y", length=0)
                axis.xaxis.set_major_formatter("{x:,g}")
                axis.grid(True, axis="x")
        return png(figure)


def _values(axis: Axes, ends: Sequence[float], texts: Sequence[str]) -> None:
    """Write each bar's value behind its end, and leave room for it."""
    axis.set_xlim(0, 1.18 * max(ends))
    for index, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axis.annotate(
            text,
            (end, index),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
