"""The report's figures, each drawn into a figure that it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from statistics import fmean
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor

from examples.digits.training import Result
from polyadic.nn import CPLinear

Grouped = dict[str, list[Result]]
# Okabe and Ito's colours, told apart by readers with colour-blindness too; one per rank.
LOOKS: dict[Any, Any] = {
    "dense": ("#000000", "s", "-"), "narrow": ("#7f7f7f", "X", "--"), 4: ("#e69f00", "o", "-"),
    16: ("#0072b2", "^", "-"), 64: ("#009e73", "D", "-"),
}  # fmt: skip
STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "grid.color": "#d9dde3", "legend.frameon": False,
}  # fmt: skip


def png(height: float, draw: Callable[[Figure, Any], None], what: Any) -> bytes:
    """Draw something into a figure of so many inches; matplotlib's global state is left alone."""
    with rc_context(STYLE):
        figure, buffer = Figure((9.6, height), layout="constrained"), BytesIO()
        draw(figure, what)
        figure.savefig(buffer, dpi=160)
    return buffer.getvalue()


def look(result: Result) -> Any:
    """Colour, marker and dash of a model, the same in every plot."""
    return LOOKS[result.contestant.rank or result.contestant.kind]


def curves(figure: Figure, grouped: Grouped) -> None:
    """Training loss and test accuracy against epochs, mean and range over the seeds."""
    axes = figure.subplots(len(grouped), 2, squeeze=False)
    for (left, right), (family, members) in zip(axes, grouped.items(), strict=True):
        for result in members:
            band(left, [curve.loss for curve in result.curves], result)
            band(right, [curve.accuracy for curve in result.curves], result)
        left.set(yscale="log", ylabel="cross-entropy (nats)", title=f"{family}: training loss")
        # Where every curve ends is to be seen, where it begins need not.
        last = [accuracy for result in members for accuracy in result.accuracies]
        right.set_ylim(max(0.0, min(75.0, max(last) - 25, min(last) - 2)), 100.5)
        right.set(ylabel="test accuracy (%)", title=f"{family}: test accuracy")
        right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def band(axis: Any, runs: Sequence[Sequence[float]], result: Result) -> None:
    """Mean and range over the runs against epochs."""
    color, _, dash = look(result)
    by_epoch = [*zip(*runs, strict=True)]
    epochs = range(1, len(by_epoch) + 1)
    axis.plot(epochs, [*map(fmean, by_epoch)], color=color, ls=dash, label=result.contestant.label)
    low, high = [*map(min, by_epoch)], [*map(max, by_epoch)]
    axis.fill_between(epochs, low, high, color=color, alpha=0.13, lw=0)
    axis.set_xlabel("epoch")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(True)


def accuracy(figure: Figure, grouped: Grouped) -> None:
    """Test accuracy against the model's parameters, one panel per family."""
    axes = figure.subplots(1, len(grouped), squeeze=False, sharey=True)[0]
    for axis, (family, members) in zip(axes, grouped.items(), strict=True):
        for result in members:
            (color, marker, _), label = look(result), result.contestant.label
            low, mean, high = (f(result.accuracies) for f in (min, fmean, max))
            how = {"color": color, "marker": marker, "ms": 8, "ls": "none", "label": label}
            errors = [[mean - low], [high - mean]]
            axis.errorbar(result.parameters, mean, yerr=errors, capsize=4, **how)
        axis.set(xscale="log", title=family, xlabel="parameters of the whole model")
        axis.set_xticks([3e3, 1e4, 3e4, 1e5], ["3,000", "10,000", "30,000", "100,000"])
        axis.minorticks_off()
        axis.grid(True)
        axis.legend(loc="lower right")
    axes[0].set_ylabel("test accuracy (%)")


def costs(figure: Figure, grouped: Grouped) -> None:
    """Time per training step and bytes kept for backward, as bars."""
    axes = figure.subplots(len(grouped), 2, squeeze=False)
    for row, (family, members) in zip(axes, grouped.items(), strict=True):
        labels, colors = zip(*((r.contestant.label, look(r)[0]) for r in members), strict=True)
        low, middle, high = zip(*([1e3 * t for t in r.step] for r in members), strict=True)
        errors = (torch.tensor([middle, high]) - torch.tensor([low, middle])).tolist()
        bars = row[0].barh(labels, middle, color=colors, xerr=errors, ecolor="#b91c1c")
        row[0].bar_label(bars, fmt="{:.2f}", padding=4)
        row[0].set(title=f"{family}: time per training step", xlabel="median, quartiles (ms)")
        bars = row[1].barh(labels, [r.kept / 1024 for r in members], color=colors)
        row[1].bar_label(bars, fmt="{:,.0f}", padding=4)
        row[1].set(title=f"{family}: kept for backward", xlabel="one batch (KiB)")
        for axis in row:
            axis.invert_yaxis()
            axis.margins(x=0.15)


def factorization(figure: Figure, layer: CPLinear) -> None:
    """A layer with two modes on each side: its factors, their products, W as a sum, its error."""
    ins, outs = ([f.detach().double() for f in fs] for fs in (layer.in_factors, layer.out_factors))
    rows, columns = (torch.einsum("ar,br->abr", *pair).flatten(0, 1) for pair in (ins, outs))
    order = (rows.norm(dim=0) * columns.norm(dim=0)).argsort(descending=True)
    parts = torch.einsum("ir,or->roi", rows, columns)[order]
    weight = parts.sum(dim=0)
    limit = float(weight.abs().flatten().quantile(0.995))
    halves: Any = figure.subfigures(2, 1)
    names = ["A_1", "A_2", r"A_1 \odot A_2", "C_1", "C_2", r"C_1 \odot C_2"]
    for axis, matrix, name in zip(
        halves[0].subplots(1, 6), (*ins, rows, *outs, columns), names, strict=True
    ):
        size = f"{matrix.shape[0]} × {matrix.shape[1]}"
        heat(axis, matrix[:, order], f"${name}$  {size}", float(matrix.abs().max()))
    *axes, last = halves[1].subplots(1, 6)
    terms = [weight, *parts[:3], parts[3:].sum(dim=0)]
    names = ["$W^T$ =", "$r=1$ +", "$r=2$ +", "$r=3$ +", f"other {len(parts) - 3}"]
    for axis, term, name in zip(axes, terms, names, strict=True):
        heat(axis, term, f"{name}\nnorm {float(term.norm() / weight.norm()):.2f}", limit)
    missing = torch.cat([weight[None], weight - parts.cumsum(dim=0)]).flatten(1).norm(dim=1)
    last.plot((missing / missing[0]).tolist(), marker="o", ms=3)
    last.set(title="error of $W$", xlabel="parts added", ylim=(0, None))
    last.grid(True)


def heat(axis: Any, matrix: Tensor, title: str, limit: float) -> None:
    """A heat map, white at zero; its colours end at ``limit``."""
    how: Any = {"vmin": -limit, "vmax": limit, "aspect": "auto", "interpolation": "nearest"}
    axis.imshow(matrix.numpy(), "RdBu_r", **how)
    axis.set_title(title)
    axis.tick_params(length=2, labelsize=7)
