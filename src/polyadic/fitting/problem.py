"""The least-squares problem behind a fit: the weight as a matrix, its modes and its metric.

All computations are on a matrix W (P, Q) whose rows are the *left* modes and whose columns are the
*right* modes. With a metric Σ (P, P) the left modes are the input side, and the error is

    f = ‖Σ^½ (W − Ŵ)‖² = ⟨W, V⟩ − 2 ⟨Ŵ, V⟩ + ⟨Ŵ, Σ Ŵ⟩,      V = Σ W (P, Q),  V = W without a metric.

Modes of size 1 carry no information: they are left out of the fit and added again at the end.

A complex weight is fitted by complex factors. ⟨A, B⟩ is then Re Σ conj(A) B, and Σ is Hermitian;
of real numbers the conjugates do nothing.

Axes: p left modes flattened (P), q right modes flattened (Q), r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyadic.formats import Shape
from polyadic.kernels.multilinear import best_cut, khatri_rao

# Most entries of a product that are formed at once where only their sum is wanted.
ROWS_OF = 2**20


@dataclass(frozen=True)
class Problem:
    """A weight to be fitted.

    Args:
        matrix: W (P, Q), float32 or float64 or complex of these, contiguous.
        weighted: V (P, Q), W itself without a metric.
        metric: Σ (P, P), its diagonal (P,), or None; of mean diagonal 1.
        left: sizes of the left modes, none of them 1 unless it is the only one.
        right: sizes of the right modes, none of them 1 unless it is the only one.
        kept: where each of these modes stands among the modes of the weight; -1 for a mode of size
            1 that was added because its side had none.
        modes: sizes of all modes of the weight, in its order.
    """

    matrix: Tensor
    weighted: Tensor
    metric: Tensor | None
    left: Shape
    right: Shape
    kept: Shape
    modes: Shape

    @property
    def sizes(self) -> Shape:
        """Sizes of the modes that are fitted, left and then right."""
        return self.left + self.right

    def apply_metric(self, rows: Tensor) -> Tensor:
        """Return Σ X for X (P, ·)."""
        if self.metric is None:
            return rows
        return self.metric.unsqueeze(1) * rows if self.metric.dim() == 1 else self.metric @ rows

    def power(self) -> float:
        """Return ⟨W, Σ W⟩, relative to which the squared error is measured."""
        return inner(self.matrix, self.weighted)

    def frobenius_power(self) -> float:
        """Return ‖W‖²."""
        return inner(self.matrix, self.matrix)

    def split(self, factors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Split factors into those of the left and those of the right modes."""
        return list(factors[: len(self.left)]), list(factors[len(self.left) :])

    def residual(self, factors: Sequence[Tensor]) -> tuple[float, float]:
        """Return ‖Σ^½ (W − Ŵ)‖² and ‖W − Ŵ‖², from the residual itself, some columns at a time.

        The residual is formed in the dtype of the factors. In float32 it cannot fall below the
        rounding of Ŵ, some 1e-7 of the weight; factors given in float64 resolve smaller ones.
        """
        left, right = self.split(factors)
        in_metric = frobenius = 0.0
        rank, dtype = factors[0].shape[1], factors[0].dtype
        columns = math.prod(self.right)
        # Blocks and Khatri-Rao products take a fraction of the weight's bytes in either dtype.
        entries = self.matrix.nbytes // dtype.itemsize
        step = max(1, min(columns, entries // (4 * max(rank, len(self.matrix)))))
        rows = max(1, min(len(self.matrix), entries // (2 * rank)))
        rest = khatri_rao(right) if rank * columns <= entries else None
        for start in range(0, columns, step):
            stop = min(columns, start + step)
            part = rest[start:stop] if rest is not None else _some_rows(right, start, stop)
            difference = self.matrix[:, start:stop].to(dtype, copy=True)
            for first in range(0, len(self.matrix), rows):
                last = min(len(self.matrix), first + rows)
                difference[first:last] -= _some_rows(left, first, last) @ part.t()
            frobenius += inner(difference, difference)
            if self.metric is not None:
                # Rounding the residual after it is formed costs digits of the residual, which is
                # small, and not digits of the weight.
                weighted = self.apply_metric(difference.to(self.metric.dtype))
                in_metric += inner(difference, weighted)
        return (frobenius if self.metric is None else max(in_metric, 0.0)), frobenius

    def to_all_modes(self, factors: Sequence[Tensor]) -> list[Tensor]:
        """Return factors (n_d, R) for all modes of the weight in its order, and balance them."""
        rank = factors[0].shape[1]
        full = [factors[0].new_ones(size, rank) for size in self.modes]
        for place, factor in zip(self.kept, factors, strict=True):
            if place >= 0:
                full[place] = factor
        for place, factor in zip(self.kept, factors, strict=True):
            if place < 0:
                full[0] = full[0] * factor
        return balanced(full)

    def to_fitted_modes(
        self, factors: Sequence[Tensor], dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        """Return the factors of the fitted modes; factors of modes of size 1 scale the first.

        Args:
            factors: the factors (n_d, R) of all modes of the weight.
            dtype: dtype of the result; that of the fit by default.
        """
        dtype = dtype or self.matrix.dtype
        every = [factor.detach().to(self.matrix.device, dtype) for factor in factors]
        rank = every[0].shape[1]
        picked = [every[p].clone() if p >= 0 else every[0].new_ones(1, rank) for p in self.kept]
        for place, factor in enumerate(every):
            if place not in self.kept:
                picked[0] *= factor
        return picked


def inner(a: Tensor, b: Tensor) -> float:
    """Return ⟨a, b⟩ of two matrices, added up in float64, some rows at a time."""
    step = max(1, ROWS_OF // a.shape[-1])
    return math.fsum(
        float((a[i : i + step].conj() * b[i : i + step]).real.sum(dtype=torch.float64))
        for i in range(0, len(a), step)
    )


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, of complex numbers in complex128."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float64))


def _some_rows(factors: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Rows start to stop of the Khatri-Rao product of the factors; other rows are not formed."""
    index = torch.arange(start, stop, device=factors[0].device)
    product: Tensor | None = None
    for factor in reversed(factors):
        rows = factor[index % len(factor)]
        product = rows if product is None else product * rows
        index = index // len(factor)
    assert product is not None
    return product


def balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """Spread the norm of every component evenly over the modes; the components stay equal.

    A component with a factor of norm 0 is left alone: scaling its other factors would only hide
    that training can still move it.
    """
    norms = torch.stack([wide(factor).norm(dim=0) for factor in factors])
    logs = norms.clamp_min(torch.finfo(torch.float64).tiny).log()
    scale = (logs.mean(0) - logs).exp().masked_fill((norms == 0).any(0), 1.0)
    return [f * s.to(f.dtype) for f, s in zip(factors, scale, strict=True)]


def make_problem(
    weight: Tensor,
    groups: Sequence[Shape],
    metric: Tensor | None,
    metric_groups: Sequence[int],
    damping: float,
) -> Problem:
    """Arrange a checked weight as a matrix of left and right modes.

    Without a metric the modes keep their order and are cut where the two Khatri-Rao products have
    the fewest entries; with a metric the modes of the input side are the left ones.

    Args:
        weight: a weight whose dimensions are modes or products of adjacent modes.
        groups: the tensorized shape.
        metric: Σ (P, P) or its diagonal (P,) over the modes of ``metric_groups``, or None.
        metric_groups: the groups of the input side, in the order of the metric.
        damping: what is added to the metric's diagonal, relative to the mean of the diagonal.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    tensor = weight.detach().to(dtype)
    modes = tuple(mode for group in groups for mode in group)
    starts = [sum(map(len, groups[:i])) for i in range(len(groups))]
    if metric is None:
        places = [place for place, mode in enumerate(modes) if mode > 1]
        cut = best_cut([modes[p] for p in places]) if len(places) > 1 else len(places)
        sides = (places[:cut], places[cut:])
    else:
        inside = [starts[g] + i for g in metric_groups for i in range(len(groups[g]))]
        outside = [place for place in range(len(modes)) if place not in inside]
        sides = ([p for p in inside if modes[p] > 1], [p for p in outside if modes[p] > 1])
    left, right = (tuple(modes[p] for p in side) or (1,) for side in sides)
    kept = (*(sides[0] or [-1]), *(sides[1] or [-1]))
    order = [*sides[0], *sides[1], *(p for p in range(len(modes)) if modes[p] == 1)]
    matrix = tensor.reshape(modes).permute(order).reshape(math.prod(left), -1).contiguous()
    weighted, sigma = matrix, None
    if metric is not None:
        sigma = _normalized(metric.detach().to(weight.device), damping).to(dtype)
        weighted = sigma.unsqueeze(1) * matrix if sigma.dim() == 1 else sigma @ matrix
    return Problem(matrix, weighted, sigma, left, right, kept, modes)


def _normalized(metric: Tensor, damping: float) -> Tensor:
    """Scale Σ to a mean diagonal of 1 and add ``damping`` to the diagonal."""
    sigma = wide(metric)
    if sigma.dim() == 1:
        return sigma / sigma.mean() + damping
    sigma = (sigma + sigma.mH) / (2 * sigma.diagonal().real.mean())
    sigma.diagonal().add_(damping)
    return sigma
