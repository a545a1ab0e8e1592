"""Normal equations of one factor: contractions that lead to them, and their solution.

Axes: n own mode, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def contract_but(product: Tensor, factors: Sequence[Tensor], d: int) -> Tensor:
    """Σ over all modes but d of ``product`` (Πn, R) times their factors: (n_d, R)."""
    rank = product.shape[1]
    for factor in reversed(factors[d + 1 :]):
        product = (product.reshape(-1, len(factor), rank) * factor).sum(1)
    for factor in factors[:d]:
        product = (product.reshape(len(factor), -1, rank) * factor.unsqueeze(1)).sum(0)
    return product


def gram(factor: Tensor) -> Tensor:
    """AᵀA (R, R) in float64."""
    wide = factor.double()
    return wide.t() @ wide


def corrected(factor: Tensor, rhs: Tensor, system: Tensor, penalty: Tensor) -> Tensor:
    """The factor that solves A (G + diag p) = Y, as a correction of the present one.

    Args:
        factor: A (n, R), the present one.
        rhs: Y (n, R).
        system: G (R, R), float64, positive semidefinite.
        penalty: p (R,), float64, not negative.
    """
    present = factor.double()
    residual = rhs.double() - present @ system - present * penalty
    lower, scale = factorized(system, penalty, factor.dtype)
    step = torch.cholesky_solve((residual * scale).t(), lower).t() * scale
    return (present + step).to(factor.dtype)


def factorized(system: Tensor, penalty: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cholesky factor of S (G + diag p) S + shift with a unit diagonal, and the scale S (R,).

    The shift is a proximal term: it leaves alone what the equations do not determine.

    Args:
        system: G (R, R), float64, positive semidefinite.
        penalty: p (R,), float64.
        dtype: of the right-hand side, whose rounding the shift exceeds; it grows a hundredfold as
            long as the matrix is not definite.
    """
    diagonal = system.diagonal() + penalty
    # A component that has vanished must not divide by zero.
    floor = max(float(diagonal.max()) * 1e-14, torch.finfo(torch.float64).tiny)
    scale = diagonal.clamp_min(floor).rsqrt()
    scaled = system * scale.unsqueeze(0) * scale.unsqueeze(1)
    unit = diagonal * scale.square()
    shift = 1e-12 if dtype == torch.float64 else 1e-7
    while True:
        scaled.diagonal().copy_(unit + shift)
        lower, info = torch.linalg.cholesky_ex(scaled)
        if int(info) == 0:
            return lower, scale
        shift *= 100
