"""Normal equations of one factor: contractions that lead to them, and their solution.

With all other factors fixed, the objective is quadratic in the factor A (n, R) of one mode, and it
is least where

    A (G + diag p) = Y

with the Gram matrix G = KᵀK (R, R) of the other factors' Khatri-Rao product K, the penalty p (R,)
and the matricized weight times K, Y (n, R) (the MTTKRP). Of complex numbers, where the derivative
by the conjugate of A vanishes, G = Kᵀ conj(K) is Hermitian, and Y is the weight times conj(K).
Components that nearly coincide make G nearly singular. So three things are done for a stable
solution:

- Not A is solved for, but its step D from the present A, D (G + diag p) = Y − A (G + diag p). A
  small right-hand side keeps the rounding of D small relative to A.
- The system is scaled to a unit diagonal, S (G + diag p) S with S = diag(G + diag p)^-½, whose
  condition number is within a factor R of the best diagonal scaling (van der Sluis, Numerische
  Mathematik 1969).
- A tiny multiple of the identity is added, which is the proximal term ε ‖D S⁻¹‖². In directions
  that the equations determine it changes D by a relative ε; in all others it makes D zero.

Axes: n own mode, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyadic.fitting.problem import wide


def contract_but(product: Tensor, factors: Sequence[Tensor], d: int) -> Tensor:
    """Contract ``product`` (Πn, R) with the factors of all modes but d: (n_d, R)."""
    rank = product.shape[1]
    for factor in reversed(factors[d + 1 :]):
        product = (product.reshape(-1, len(factor), rank) * factor).sum(1)
    for factor in factors[:d]:
        product = (product.reshape(len(factor), -1, rank) * factor.unsqueeze(1)).sum(0)
    return product


def gram(factor: Tensor) -> Tensor:
    """Return Aᵀ conj(A) (R, R) in float64 or complex128."""
    own = wide(factor)
    return own.t() @ own.conj()


def solve_step(factor: Tensor, rhs: Tensor, system: Tensor, penalty: Tensor) -> Tensor:
    """Return the factor that solves A (G + diag p) = Y: the present one plus a step.

    Args:
        factor: the present A (n, R).
        rhs: Y (n, R).
        system: G (R, R), float64 or complex128, positive semidefinite.
        penalty: p (R,), float64, not negative.
    """
    present = wide(factor)
    residual = wide(rhs) - present @ system - present * penalty  # Y − A (G + diag p)
    lower, scale = scaled_cholesky(system, penalty, factor.dtype)
    step = torch.cholesky_solve((residual * scale).mH, lower).mH * scale  # D
    return (present + step).to(factor.dtype)


def scaled_cholesky(system: Tensor, penalty: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factorize S (G + diag p) S + ε I, whose first term has a unit diagonal.

    Args:
        system: G (R, R), float64 or complex128, positive semidefinite.
        penalty: p (R,), float64.
        dtype: dtype of the right-hand side. ε starts above its rounding and grows a hundredfold
            until the matrix is definite.

    Returns:
        The lower Cholesky factor (R, R), in the dtype of G, and the diagonal of S (R,), in float64.
    """
    diagonal = system.diagonal().real + penalty
    # A component that has vanished has a zero on the diagonal, by which nothing may be divided.
    floor = max(float(diagonal.max()) * 1e-14, torch.finfo(torch.float64).tiny)
    scale = diagonal.clamp_min(floor).rsqrt()
    scaled = system * scale.unsqueeze(0) * scale.unsqueeze(1)
    unit = diagonal * scale.square()
    shift = 1e-12 if torch.finfo(dtype).bits == 64 else 1e-7
    while True:
        scaled.diagonal().copy_(unit + shift)
        lower, info = torch.linalg.cholesky_ex(scaled)
        if int(info) == 0:
            return lower, scale
        shift *= 100
