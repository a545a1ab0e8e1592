"""Where a fit begins: orthogonal rank-one expansions, random factors, and the exact cases.

A tensor is a sum of orthonormal rank-one terms (TTr1SVD: Batselier, Liu & Wong, SIAM J. Matrix
Analysis 2015): an SVD splits off one mode, or one side, and the singular vectors of the rest are
split in turn. The terms are mutually orthogonal, so that the R largest are the best choice of R
among them and the squared error is that of the terms left out; where at most R terms are not zero,
the expansion is exact. Peeling off one mode after the other, the largest last, needs at most
Π n / max n terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from polyadic.fitting.problem import Problem, wide
from polyadic.formats import Shape

OVERSAMPLING = 10
POWER_STEPS = 2


def exact_rank(sizes: Sequence[int]) -> int:
    """Return Π n / max n, a number of components with which every tensor has an exact CP."""
    return math.prod(sizes) // max(sizes)


def orthogonal_terms(problem: Problem, rank: int, generator: torch.Generator) -> list[Tensor]:
    """Return the ``rank`` largest terms of an orthogonal expansion of W, as factors (n_d, R).

    Where that is exact, one mode after the other is split off; else first the left side from the
    right.
    """
    sizes, matrix = problem.sizes, problem.matrix
    if rank >= exact_rank(sizes):
        order = sorted(range(len(sizes)), key=lambda d: sizes[d])
        whole = matrix.view(sizes).permute(order).reshape(1, -1)
        norm = whole.norm().clamp_min(torch.finfo(whole.dtype).tiny)
        terms = _Terms(norm.reshape(1), {}, {tuple(order): whole / norm}, sizes)
    else:
        u, s, v = truncated_svd(matrix, rank, generator)
        cut = len(problem.left)
        left, right = (
            tuple(sorted(side, key=lambda d: sizes[d]))
            for side in (range(cut), range(cut, len(sizes)))
        )
        pending = {
            side: vectors.t()
            .reshape(-1, *own)
            .permute(0, *(1 + d - base for d in side))
            .reshape(len(s), -1)
            for side, vectors, own, base in (
                (left, u, problem.left, 0),
                (right, v, problem.right, cut),
            )
        }
        terms = _Terms(s, {}, pending, sizes)
    while terms.pending:
        terms.peel(rank)
    return terms.factors(rank)


class _Terms:
    """Orthonormal terms on their way to rank one.

    Args:
        scale: the norm of each term (n,).
        done: by mode, the unit vectors (n, size) of the modes that are split off.
        pending: by group of modes, the unit vectors (n, Π sizes) that are still to be split.
        sizes: sizes of all modes.
    """

    def __init__(
        self,
        scale: Tensor,
        done: dict[int, Tensor],
        pending: dict[tuple[int, ...], Tensor],
        sizes: Shape,
    ) -> None:
        self.scale, self.done, self.pending, self.sizes = scale, done, pending, sizes
        self._settle()

    def _settle(self) -> None:
        for modes in [modes for modes in self.pending if len(modes) == 1]:
            self.done[modes[0]] = self.pending.pop(modes)

    def peel(self, rank: int) -> None:
        """Split the first mode off one group and keep the ``rank`` largest terms."""
        modes = next(iter(self.pending))
        group = self.pending.pop(modes)
        first, *rest = modes
        u, s, vh = torch.linalg.svd(
            group.reshape(len(group), self.sizes[first], -1), full_matrices=False
        )
        scale = (self.scale.unsqueeze(1) * s).flatten()
        keep = scale.argsort(descending=True, stable=True)[:rank]
        term, column = keep // s.shape[1], keep % s.shape[1]
        self.scale = scale[keep]
        self.done = {mode: vectors[term] for mode, vectors in self.done.items()}
        self.pending = {key: vectors[term] for key, vectors in self.pending.items()}
        self.done[first] = u[term, :, column]
        self.pending[tuple(rest)] = vh[term, column]
        self._settle()

    def factors(self, rank: int) -> list[Tensor]:
        """Return factors (n_d, R); components beyond the terms are zero in the last mode alone."""
        spread = self.scale.abs() ** (1 / len(self.sizes))
        found = [(self.done[d] * spread.unsqueeze(1)).t() for d in range(len(self.sizes))]
        missing = rank - len(self.scale)
        if missing == 0:
            return [factor.contiguous() for factor in found]
        level = float(spread.max())
        filled = []
        for d, factor in enumerate(found):
            size, last = len(factor), d == len(found) - 1
            spare = torch.zeros(size, missing, dtype=factor.dtype, device=factor.device)
            if not last:
                rows = torch.arange(missing, device=factor.device)
                spare[(rows // math.prod(self.sizes[:d])) % size, rows] = level
            filled.append(torch.cat([factor, spare], 1))
        return filled


def truncated_svd(
    matrix: Tensor, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading terms of W = U diag(s) Vᵀ, at most ``rank``: U (P, k), s (k,), V (Q, k).

    Of complex numbers the columns of V are the conjugates of the right singular vectors.

    They are found by randomized range finding with power steps if the rank is small beside the
    matrix (Halko, Martinsson & Tropp, SIAM Review 2011, algorithm 4.4), and else by the full SVD.
    """
    least = min(matrix.shape)
    sketch = rank + OVERSAMPLING
    if 3 * sketch > least:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        k = min(rank, least)
        return u[:, :k], s[:k], vh[:k].t()
    draw = torch.randn(
        matrix.shape[1], sketch, generator=generator, dtype=matrix.dtype, device=generator.device
    )
    q = torch.linalg.qr(matrix @ draw.to(matrix.device))[0]
    for _ in range(POWER_STEPS):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mH @ q)[0])[0]
    u, s, vh = torch.linalg.svd(q.mH @ matrix, full_matrices=False)
    return (q @ u)[:, :rank], s[:rank], vh[:rank].t()


def _root(sigma: Tensor) -> Tensor:
    """Return S with SᴴS = Σ, by Cholesky, or by eigenvalues if Σ is singular up to rounding."""
    lower, info = torch.linalg.cholesky_ex(sigma)
    if int(info) == 0:
        root: Tensor = lower.mH
    else:
        values, vectors = torch.linalg.eigh(sigma)
        root = values.clamp_min(0).sqrt().unsqueeze(1) * vectors.mH
    return root


def low_rank(problem: Problem, rank: int) -> list[Tensor]:
    """Return the optimum for two modes: A (P, R), C (Q, R) with W ≈ A Cᵀ in the problem's metric.

    Let V (Q, R) hold the leading right singular vectors of Σ^½ W. The best approximation of
    Σ^½ W of rank R is Σ^½ W V Vᴴ (Eckart & Young), so that A = W V and C = conj(V) are optimal,
    without an inverse of Σ. At full rank V is taken from the plain SVD of W, which is exact in
    every metric.
    """
    matrix, full = problem.matrix, min(problem.matrix.shape)
    seen = weighted = wide(matrix)
    if problem.metric is not None and rank < full:
        sigma = wide(problem.metric)
        if sigma.dim() == 1:
            weighted = sigma.sqrt().unsqueeze(1) * seen
        else:
            weighted = _root(sigma) @ seen
    if weighted.shape[0] > 2 * weighted.shape[1]:
        weighted = torch.linalg.qr(weighted, mode="r")[1]
    vh = torch.linalg.svd(weighted, full_matrices=False)[2]
    right = vh[: min(rank, full)].t()
    left = seen @ right.conj()
    missing = rank - right.shape[1]
    if missing:
        spare = torch.zeros(len(left), missing, dtype=left.dtype, device=left.device)
        rows = torch.arange(missing, device=left.device)
        spare[rows % len(left), rows] = left.norm(dim=0).max().to(left.dtype)
        left = torch.cat([left, spare], 1)
        right = torch.cat([right, right.new_zeros(len(right), missing)], 1)
    return [left.to(matrix.dtype), right.to(matrix.dtype)]


def random_factors(problem: Problem, rank: int, generator: torch.Generator) -> list[Tensor]:
    """Draw Gaussian factors (n_d, R) with columns of one norm, whose CP has about the norm of W."""
    matrix, factors = problem.matrix, []
    for size in problem.sizes:
        draw = torch.randn(
            size,
            rank,
            generator=generator,
            dtype=torch.promote_types(matrix.dtype, torch.float64),
            device=generator.device,
        )
        factors.append((draw / draw.norm(dim=0)).to(matrix.device, matrix.dtype))
    # A weight of zeros gets factors of norm one: a layer whose factors are all zero cannot train.
    level = (float(matrix.norm()) / math.sqrt(rank) or 1.0) ** (1 / len(factors))
    return [factor * level for factor in factors]
