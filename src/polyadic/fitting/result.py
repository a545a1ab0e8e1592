"""What a fit returns: the CP tensor, how good it is, and how fragile."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polyadic.fitting.normal import gram
from polyadic.tensor import CPTensor


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A weight's CP format as ``polyadic.decompose`` found it. ``print`` it for the reasons.

    Attributes:
        cp: the ``CPTensor``, without λ, every component's norm spread evenly over the modes; in
            the weight's dtype, on its device.
        error: ‖Σ^½(W − Ŵ)‖ / ‖Σ^½W‖ in the metric that was minimised (with its damping); the
            Frobenius error where there is none.
        frobenius_error: ‖W − Ŵ‖ / ‖W‖.
        growth: √(Σ_r ‖w_r‖²) / ‖W‖ for the components w_r: 1 where they are orthogonal, large
            where they cancel each other.
        sensitivity: Σ_d n_d Σ_r Π_{k≠d} ‖a_kr‖² / ‖W‖², the expected squared relative change of
            the weight under noise of variance 1 in every factor entry (Phan et al., ECCV 2020).
        congruence: largest |cosine| between two components.
        mean_congruence: root mean square of the cosines between all pairs.
        start: the start of the fit, which won the race if there were several.
        raced: (start, error) of every start when the race was decided.
        further: final errors of further fits from random starts.
        regularization: τ at the end.
        iterations: sweeps of the fit that won, from its start on.
        history: relative error in the metric after each of these sweeps.
        seconds: wall-clock time, starts and race included.
        converged: whether the fit ended by ``tolerance`` or in closed form, and not by a limit or
            the callback.
        reason: why the fit ended.
    """

    cp: CPTensor
    error: float
    frobenius_error: float
    growth: float
    sensitivity: float
    congruence: float
    mean_congruence: float
    start: str
    raced: tuple[tuple[str, float], ...]
    further: tuple[float, ...]
    regularization: float
    iterations: int
    history: tuple[float, ...] = field(repr=False)
    seconds: float
    converged: bool
    reason: str

    def __str__(self) -> str:
        """Describe the result in a few lines: errors, fragility, its start, why it ended."""
        cp = self.cp
        own, dense = sum(f.numel() for f in cp.factors), math.prod(cp.shape)
        others = ", ".join(f"{name} {error:.4g}" for name, error in self.raced)
        further = ", ".join(f"{error:.4g}" for error in self.further)
        lines = [
            f"{cp.tensorized_shape} at rank {cp.rank}: {own} parameters for {dense} "
            f"({dense / own:.2f}x fewer)",
            f"relative error {self.error:.4g}; Frobenius {self.frobenius_error:.4g}",
            f"growth {self.growth:.3g} (1: orthogonal components), largest congruence "
            f"{self.congruence:.3f}, sensitivity {self.sensitivity:.3g}, "
            f"regularization {self.regularization:.1g}",
            f"began with {self.start}" + (f" (race: {others})" if len(self.raced) > 1 else ""),
            *([f"further fits from random starts: {further}"] if further else []),
            f"{self.reason} after {self.iterations} sweeps, {self.seconds:.2f} s",
        ]
        return "\n".join(lines)


class DecomposeInterrupted(KeyboardInterrupt):
    """Ctrl-C during a fit; ``decomposition`` holds the result so far, usable as ``start``."""

    def __init__(self, decomposition: Decomposition) -> None:
        super().__init__("decompose was interrupted; the result so far is in .decomposition")
        self.decomposition = decomposition


@dataclass(frozen=True)
class Fragility:
    """How much components cancel and coincide; ``Decomposition`` says what each number is."""

    growth: float
    sensitivity: float
    congruence: float
    mean_congruence: float


def fragility(factors: Sequence[Tensor], norm: float) -> Fragility:
    """Measure how much the components of a CP cancel and coincide.

    Args:
        factors: the factors, (n_d, R) each.
        norm: ‖W‖.
    """
    rank = factors[0].shape[1]
    cosines = torch.ones(rank, rank, dtype=torch.float64, device=factors[0].device)
    squares = []
    for factor in factors:
        product = gram(factor)
        square = product.diagonal().real.clone()
        scale = square.clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
        cosines *= product.abs() * scale.unsqueeze(0) * scale.unsqueeze(1)
        squares.append(square)
    stacked = torch.stack(squares)
    # Products over all modes but one; a quotient of the full product could divide by zero.
    sensitivity = sum(
        len(factor) * float(torch.cat([stacked[:d], stacked[d + 1 :]]).prod(0).sum())
        for d, factor in enumerate(factors)
    )
    cosines.fill_diagonal_(0)
    pairs = max(1, rank * (rank - 1))
    norm = norm or 1.0
    return Fragility(
        growth=math.sqrt(float(stacked.prod(0).sum())) / norm,
        sensitivity=sensitivity / norm**2,
        congruence=min(1.0, float(cosines.max())),
        mean_congruence=math.sqrt(float(cosines.square().sum()) / pairs),
    )
