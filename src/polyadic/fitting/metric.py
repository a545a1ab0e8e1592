"""Updates of the factors on the side that has a metric.

For a mode d of the input side the normal equations couple its rows, because Σ does:

    Σ_{i',r'} H[(i,r),(i',r')] X[i',r'] + τ D[r] X[i,r] = Y[i,r],
    H[(i,r),(i',r')] = (Σ_{j,j'} K[j,r] Σ[(i,j),(i',j')] K[j',r']) · GC[r,r']

with K the Khatri-Rao product of the side's other factors and GC the Gram matrix of the other side.
Of complex numbers the first K is its conjugate, and GC its transpose.
There are three ways to solve them:

1. A diagonal Σ decouples the rows: H is zero for i ≠ i', and each row has a system (R, R).
2. If H has few unknowns m R, it is built and the system is solved directly.
3. Otherwise a few steps of preconditioned conjugate gradients are taken. H is applied without
   being built: H X = contract(Σ (A_X GC), K), where A_X is the Khatri-Rao product of the side with
   X in the place of the mode's factor. The preconditioner replaces Σ by S ⊗ I, where
   S[i,i'] = mean_j Σ[(i,j),(i',j)] (m, m); then H becomes the Kronecker product S ⊗ (KᵀK ∘ GC),
   whose two parts are inverted separately. Every step lowers the objective, so that a sweep needs
   no exact solution.

Axes: i own mode (m), j other modes of the side (J), r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polyadic.fitting.normal import contract_but, gram, scaled_cholesky, solve_step
from polyadic.fitting.problem import inner, wide
from polyadic.kernels.multilinear import khatri_rao

# Most unknowns of one mode for which H is built and solved directly.
DIRECT_UNKNOWNS = 768
# Steps of conjugate gradients that update one mode in a sweep.
CG_STEPS = 3


def solve_in_metric(
    metric: Tensor,
    factors: Sequence[Tensor],
    d: int,
    rhs: Tensor,
    outer: Tensor,
    penalty: Tensor,
) -> Tensor:
    """Return a factor of mode d that minimises the objective, or that lowers it (way 3).

    Args:
        metric: Σ (P, P), or its diagonal (P,).
        factors: the factors (m_e, R) of all modes of the input side.
        d: the mode whose factor is updated.
        rhs: Y (m_d, R).
        outer: GC (R, R), float64 or complex128.
        penalty: τ D (R,), float64.
    """
    size, rank = factors[d].shape
    if metric.dim() == 1:
        return _row_by_row(metric, factors, d, rhs, outer, penalty)
    if size * rank <= DIRECT_UNKNOWNS:
        system = _built(metric, factors, d) * outer.view(1, rank, 1, rank)
        return solve_step(
            factors[d].reshape(1, -1),
            rhs.reshape(1, -1),
            system.reshape(size * rank, -1),
            penalty.repeat(size),
        ).view(size, rank)
    return _iterated(metric, factors, d, rhs, outer, penalty)


def _others(factors: Sequence[Tensor], d: int) -> Tensor:
    """Return K (J, R); a row of ones if the side has one mode alone."""
    rest = [factor for e, factor in enumerate(factors) if e != d]
    return khatri_rao(rest) if rest else factors[d].new_ones(1, factors[d].shape[1])


def _row_by_row(
    metric: Tensor,
    factors: Sequence[Tensor],
    d: int,
    rhs: Tensor,
    outer: Tensor,
    penalty: Tensor,
) -> Tensor:
    """Way 1: one (R, R) system for each row of the factor."""
    weights = metric.view([len(f) for f in factors]).movedim(d, 0).reshape(len(factors[d]), -1)
    kernel, result = _others(factors, d), torch.empty_like(factors[d])
    for i, row in enumerate(weights):
        # H[(i,r),(i,r')] = Σ_j K[j,r] Σ[(i,j)] K[j,r'] · GC[r,r']
        system = wide(kernel.t() @ (row.unsqueeze(1) * kernel.conj())) * outer
        system = (system + system.mH) / 2
        result[i] = solve_step(factors[d][i : i + 1], rhs[i : i + 1], system, penalty)
    return result


def _built(metric: Tensor, factors: Sequence[Tensor], d: int) -> Tensor:
    """Contract Σ with K on both sides: (m, R, m, R), wide, the transpose of H without GC."""
    sizes = [len(f) for f in factors]
    before, size, after = math.prod(sizes[:d]), sizes[d], math.prod(sizes[d + 1 :])
    rank = factors[d].shape[1]
    kernel = _others(factors, d).view(before, after, rank)
    # Σ_j K[j,r] Σ[(i,j),p], and then Σ_j' of that times K[j',r'].
    mirrored = metric.conj().view(before, size, after, -1)
    once = torch.einsum("aibp,abr->irp", mirrored, kernel)
    twice = torch.einsum("paib,abr->pir", once.reshape(-1, before, size, after), kernel.conj())
    square = wide(twice.reshape(size * rank, size * rank))
    return ((square + square.mH) / 2).view(size, rank, size, rank)


def _iterated(
    metric: Tensor,
    factors: Sequence[Tensor],
    d: int,
    rhs: Tensor,
    outer: Tensor,
    penalty: Tensor,
) -> Tensor:
    """Way 3: some steps of preconditioned conjugate gradients."""
    coupling, pull = outer.to(rhs.dtype), penalty.to(rhs.dtype)
    own = list(factors)

    def apply(x: Tensor) -> Tensor:
        own[d] = x
        in_metric = metric @ khatri_rao(own) @ coupling  # Σ A_X GC
        return contract_but(in_metric, [f.conj() for f in own], d) + pull * x  # H X + τ D X

    precondition = _preconditioner(metric, factors, d, outer, penalty)
    return conjugate_gradients(apply, rhs, factors[d], precondition, CG_STEPS)


def _preconditioner(
    metric: Tensor, factors: Sequence[Tensor], d: int, outer: Tensor, penalty: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return the map X → (S ⊗ (KᵀK ∘ GC + τ D))⁻¹ X for X (m, R).

    S is inverted by its eigenvalues, of which none counts for less than 1e-6 of the largest.
    """
    sizes = [len(f) for f in factors]
    before, size, after = math.prod(sizes[:d]), sizes[d], math.prod(sizes[d + 1 :])
    blocks = metric.view(before, size, after, before, size, after)
    mean = wide(blocks.diagonal(dim1=0, dim2=3).diagonal(dim1=1, dim2=3).mean((2, 3)))  # S
    values, vectors = torch.linalg.eigh(mean)
    values = values.clamp_min(float(values.max()) * 1e-6)
    system = outer.clone()
    for e, factor in enumerate(factors):
        if e != d:
            system *= gram(factor)  # KᵀK ∘ GC
    lower, scale = scaled_cholesky(system, penalty, factors[d].dtype)

    def precondition(x: Tensor) -> Tensor:
        rows = vectors @ ((vectors.mH @ (wide(x) * scale)) / values.unsqueeze(1))
        return (torch.cholesky_solve(rows.mH, lower).mH * scale).to(x.dtype)

    return precondition


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    rhs: Tensor,
    start: Tensor,
    precondition: Callable[[Tensor], Tensor],
    steps: int,
) -> Tensor:
    """Take preconditioned steps from ``start`` towards the solution of H x = rhs.

    H is Hermitian and positive definite, and so is the preconditioner. Hestenes & Stiefel, J. Res.
    Nat. Bur. Standards 1952.

    Args:
        apply: maps x to H x.
        rhs: the right-hand side.
        start: the first x.
        precondition: maps a residual to an approximation of H⁻¹ times it.
        steps: most steps; fewer are taken where the residual vanishes.
    """
    x, residual = start, rhs - apply(start)
    z = precondition(residual)
    direction, rho = z, inner(residual, z)
    first = rho
    for _ in range(steps):
        if not rho > 1e-14 * first or first == 0:
            break
        image = apply(direction)
        curvature = inner(direction, image)
        if not curvature > 0:
            break
        x = x + (rho / curvature) * direction
        residual = residual - (rho / curvature) * image
        z = precondition(residual)
        rho, before = inner(residual, z), rho
        direction = z + (rho / before) * direction
    return x
