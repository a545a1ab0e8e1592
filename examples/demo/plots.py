"""The report's figures: each a small panel, so that a page can set them side by side or not."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

from examples.demo import language
from examples.demo.training import Result
from polyadic.compression.html import TEXT
from polyadic.nn import CPLinear

# Okabe and Ito's colours, told apart by readers with colour-blindness too; one per rank.
LOOKS: dict[Any, Any] = {
    "dense": (TEXT, "s", "-"), "narrow": ("#7f7f7f", "X", "--"), 4: ("#e69f00", "o", "-"),
    16: ("#0072b2", "^", "-"), 48: ("#009e73", "D", "-"),
}  # fmt: skip
LANGUAGE_LOOKS = {
    language.DENSE: (TEXT, "s"), language.NARROW: ("#7f7f7f", "X"), language.CP: ("#009e73", "D"),
    language.LOW_RANK: ("#e69f00", "o"),
}  # fmt: skip


def losses(figure: Figure, what: tuple[Sequence[language.Trained], str]) -> None:
    """Held-out loss of the language models against what they cost."""
    trained, cost = what
    axis = figure.subplots()
    for one in trained:
        color, marker = LANGUAGE_LOOKS[one.contestant]
        x = one.parameters if cost == "parameters" else 1e3 * one.seconds
        axis.plot(x, one.loss, marker, color=color, ms=9, label=one.contestant.label)
    if cost == "parameters":
        axis.set(xscale="log", xlabel="parameters of the blocks")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axis.minorticks_off()
    else:
        axis.set(xlim=(0, None), xlabel="processor time of a step (ms)")
    axis.set_ylabel("held-out loss (nats a byte)")
    axis.margins(0.12)
    axis.grid(True)
    axis.legend(loc="best")


def look(result: Result) -> Any:
    """Colour, marker and dash of a model, the same in every plot."""
    return LOOKS[result.contestant.rank or result.contestant.kind]


def curves(figure: Figure, what: tuple[Sequence[Result], str]) -> None:
    """Training loss or test accuracy of a family against epochs, mean and range over the seeds."""
    members, which = what
    axis = figure.subplots()
    for result in members:
        band(axis, [getattr(curve, which) for curve in result.curves], result)
    if which == "loss":
        axis.set(yscale="log", ylabel="cross-entropy (nats)", title="training loss")
    else:
        # Where every curve ends is to be seen, where it begins need not.
        last = [accuracy for result in members for accuracy in result.accuracies]
        axis.set_ylim(max(0.0, min(75.0, max(last) - 25, min(last) - 2)), 100.5)
        axis.set(ylabel="test accuracy (%)", title="test accuracy")
    axis.legend(loc="best")


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


def accuracy(figure: Figure, members: Sequence[Result]) -> None:
    """Test accuracy of a family against the model's parameters."""
    axis = figure.subplots()
    for result in members:
        (color, marker, _), label = look(result), result.contestant.label
        low, mean, high = (f(result.accuracies) for f in (min, fmean, max))
        how = {"color": color, "marker": marker, "ms": 8, "ls": "none", "label": label}
        errors = [[mean - low], [high - mean]]
        axis.errorbar(result.parameters, mean, yerr=errors, capsize=4, **how)
    axis.set(xscale="log", xlabel="parameters of the whole model", ylabel="test accuracy (%)")
    axis.set_xticks([3e3, 1e4, 3e4, 1e5], ["3,000", "10,000", "30,000", "100,000"])
    axis.minorticks_off()
    axis.margins(0.12)
    axis.grid(True)
    axis.legend(loc="best")


def costs(figure: Figure, what: tuple[Sequence[Result], str]) -> None:
    """Time per training step, or bytes kept for backward, of a family as bars."""
    members, cost = what
    axis = figure.subplots()
    labels, colors = zip(*((r.contestant.label, look(r)[0]) for r in members), strict=True)
    if cost == "time":
        low, middle, high = zip(*([1e3 * t for t in r.step] for r in members), strict=True)
        errors = (torch.tensor([middle, high]) - torch.tensor([low, middle])).tolist()
        bars = axis.barh(labels, middle, color=colors, xerr=errors, ecolor="#b91c1c")
        axis.bar_label(bars, fmt="{:.2f}", padding=4)
        axis.set(title="time per training step", xlabel="median, quartiles (ms)")
    else:
        bars = axis.barh(labels, [r.kept / 1024 for r in members], color=colors)
        axis.bar_label(bars, fmt="{:,.0f}", padding=4)
        axis.set(title="kept for backward", xlabel="one batch (KiB)")
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
    how: Any = {"vmin": -limit, "vmax": limit, "aspect": "auto", "interpolation": "none"}
    axis.imshow(matrix.numpy(), "RdBu_r", **how)
    axis.set_title(title)
    axis.tick_params(length=2, labelsize=7)
