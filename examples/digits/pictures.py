"""Pictures of one trained CP layer: its factors, their Khatri-Rao products, and W as a sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polyadic.compression.html import new_figure, png, style
from polyadic.nn import CPLinear

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAP = "RdBu_r"


@dataclass(frozen=True)
class Parts:
    """A CP layer taken apart, in float64.

    Attributes:
        in_factors: In-factors ``(m_d, R)``, the components in order of falling norm.
        out_factors: Out-factors ``(n_d, R)``, in the same order.
        in_product: Khatri-Rao product of the in-factors, ``(M, R)``.
        out_product: Khatri-Rao product of the out-factors, ``(N, R)``.
        norms: Frobenius norm of each rank-one part, ``(R,)``, falling.
    """

    in_factors: tuple[Tensor, ...]
    out_factors: tuple[Tensor, ...]
    in_product: Tensor
    out_product: Tensor
    norms: Tensor

    @property
    def weight(self) -> Tensor:
        """The dense matrix the factors stand for, ``(M, N)``: y = x W."""
        return self.in_product @ self.out_product.T

    def part(self, r: int) -> Tensor:
        """Rank-one part ``r`` of the sum, ``(M, N)``."""
        return torch.outer(self.in_product[:, r], self.out_product[:, r])


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """Multiply factors column by column, in the Kronecker sense.

    Args:
        factors: Matrices ``(m_d, R)``.

    Returns:
        ``(prod m_d, R)``; the last factor's index runs fastest.
    """
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None, :] * factor[None, :, :]).reshape(-1, factor.shape[1])
    return product


def take_apart(layer: CPLinear) -> Parts:
    """Read a layer's factors, and sort its components by the norm of their rank-one part.

    Args:
        layer: A CP linear layer without component weights.

    Returns:
        Its parts.
    """
    ins = [factor.detach().double() for factor in layer.in_factors]
    outs = [factor.detach().double() for factor in layer.out_factors]
    norms = khatri_rao(ins).norm(dim=0) * khatri_rao(outs).norm(dim=0)
    order = norms.argsort(descending=True)
    ins = [factor[:, order] for factor in ins]
    outs = [factor[:, order] for factor in outs]
    return Parts(tuple(ins), tuple(outs), khatri_rao(ins), khatri_rao(outs), norms[order])


def factors(parts: Parts) -> bytes:
    """Draw the factors as heat maps, their Khatri-Rao products, and W.

    Args:
        parts: A layer with in-modes (8, 8), rows and columns of an image, and two out-modes.

    Returns:
        A PNG.
    """
    rank = parts.norms.numel()
    with style():
        figure = new_figure(9.6, 6.6)
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.9, 1.0))[0]
        grid = left.add_gridspec(2, 3)
        sides = (
            ("A", parts.in_factors, parts.in_product, ("image row", "image column", "pixel")),
            ("C", parts.out_factors, parts.out_product, ("out-mode 1", "out-mode 2", "unit")),
        )
        for line, (letter, pair, product, ylabels) in enumerate(sides):
            names = (f"${letter}_1$", f"${letter}_2$", f"${letter}_1 \\odot {letter}_2$")
            matrices = (*pair, product)
            for column, (matrix, name) in enumerate(zip(matrices, names, strict=True)):
                axis = left.add_subplot(grid[line, column])
                _heat(axis, matrix)
                axis.set_title(f"{name}  {matrix.shape[0]} × {rank}", fontweight="normal")
                axis.set_ylabel(ylabels[column])
                axis.set_xlabel("component $r$")
        left.suptitle("factors of the in-modes (top) and of the out-modes (bottom)", fontsize=11)
        axis = right.subplots()
        weight = parts.weight
        image = _heat(axis, weight.T, _limit(weight))
        axis.set_title(f"dense $W^T$  {weight.shape[1]} × {weight.shape[0]}", fontweight="normal")
        axis.set_xlabel("pixel")
        axis.set_ylabel("unit")
        right.colorbar(image, ax=axis, label="weight", extend="both", shrink=0.6)
        return png(figure)


def rank_one_sum(parts: Parts) -> bytes:
    """Draw W as a sum of rank-one parts, and what each component reads from the image.

    Args:
        parts: A layer with in-modes (8, 8).

    Returns:
        A PNG.
    """
    weight = parts.weight
    rank = parts.norms.numel()
    shown = min(3, rank)
    rest = weight - sum(parts.part(r) for r in range(shown))
    terms = [weight, *(parts.part(r) for r in range(shown)), rest]
    total = weight.norm()
    titles = ["$W^T$"]
    titles += [f"$r = {r + 1}$, norm {parts.norms[r] / total:.2f}" for r in range(shown)]
    titles += [f"other {rank - shown}, norm {rest.norm() / total:.2f}"]
    limit = _limit(weight)
    with style():
        figure = new_figure(9.6, 6.2)
        top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.35, 1.0))[:, 0]
        axes = top.subplots(1, len(terms), sharey=True)
        for index, (axis, term, title) in enumerate(zip(axes, terms, titles, strict=True)):
            image = _heat(axis, term.T, limit)
            axis.set_title(title, fontsize=9, fontweight="normal", loc="center")
            axis.set_xlabel("pixel")
            if index:
                sign = "=" if index == 1 else "+"
                axis.annotate(
                    sign,
                    (0, 0.5),
                    xycoords="axes fraction",
                    xytext=(-8, 0),
                    textcoords="offset points",
                    ha="center",
                    va="center",
                    fontsize=14,
                )
        axes[0].set_ylabel("unit")
        top.colorbar(image, ax=axes, label="weight", extend="both", shrink=0.9)
        components, error = bottom.subfigures(1, 2, squeeze=False, width_ratios=(1.7, 1.0))[0]
        _components(components, parts)
        axis = error.subplots()
        axis.plot(range(rank + 1), partial_sum_errors(parts), marker="o", ms=4, color="#0072b2")
        axis.set_title("error of the partial sums", fontweight="normal")
        axis.set_xlabel("parts added, largest first")
        axis.set_ylabel("relative error of $W$")
        axis.set_ylim(bottom=0)
        axis.grid(True)
        return png(figure)


def partial_sum_errors(parts: Parts) -> list[float]:
    """Relative Frobenius error of the sum of the first k parts, for k from 0 to R."""
    weight = parts.weight
    total = float(weight.norm())
    errors = []
    for count in range(parts.norms.numel() + 1):
        partial = parts.in_product[:, :count] @ parts.out_product[:, :count].T
        errors.append(float((weight - partial).norm()) / total)
    return errors


def _components(figure: Figure, parts: Parts) -> None:
    """Each column of the in-side's Khatri-Rao product, as an image of rank one."""
    rank = parts.norms.numel()
    columns = 8
    rows = -(-min(rank, 16) // columns)
    axes = figure.subplots(rows, columns, squeeze=False)
    for r, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if r < rank:
            sides = (parts.in_factors[0].shape[0], parts.in_factors[1].shape[0])
            _heat(axis, parts.in_product[:, r].reshape(sides), aspect="equal")
            axis.set_title(f"$r={r + 1}$", fontsize=8, fontweight="normal", loc="center")
    figure.suptitle("what each component reads: $A_1[:, r] \\otimes A_2[:, r]$", fontsize=11)


def _limit(weight: Tensor) -> float:
    """Magnitude where the colours end; the few weights beyond it would pale all others."""
    return float(weight.abs().flatten().quantile(0.995))


def _heat(axis: Axes, matrix: Tensor, limit: float | None = None, aspect: Any = "auto") -> Any:
    """Heat map with white at zero; without a limit, its own largest magnitude."""
    bound = float(matrix.abs().max()) if limit is None else limit
    image = axis.imshow(
        matrix.numpy(),
        cmap=_MAP,
        vmin=-bound,
        vmax=bound,
        aspect=aspect,
        interpolation="nearest",
        extent=(0.5, matrix.shape[1] + 0.5, matrix.shape[0] + 0.5, 0.5),
    )
    axis.spines[:].set_visible(True)
    axis.tick_params(length=2, labelsize=8)
    return image
